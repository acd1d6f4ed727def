"""bin/image-check: what the image promises, checked on a built image and on its containers."""
