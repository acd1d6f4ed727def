# Cline's command line, once; then: cline 'say hello'. In VS Code, for Cline and Roo Code alike: API Provider "OpenAI
# Compatible", and the same base URL, key and model.
cline auth --provider openai-compatible --baseurl http://127.0.0.1:9090/v1 --modelid grok-4.5 \
    --apikey "${XAIPROXY_KEY:-none}"
