# docker build -t xaiproxy .
FROM python:3.13-slim

# supervisord requires a temporary folder, although it writes nothing there. Container runtimes provide this one even if
# the root file system is read-only.
ENV TMPDIR=/dev/shm

# A fixed number, so that the owner of a mounted folder can be set from outside and runAsNonRoot can be checked.
RUN groupadd --gid 10001 xaiproxy && useradd --uid 10001 --gid 10001 --create-home xaiproxy \
    && install -d -m 0700 -o 10001 -g 10001 /data

# The requirements, in a layer that does not depend on xaiproxy's code.
WORKDIR /src
COPY conf/requirements.txt ./
RUN pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements.txt

COPY setup.cfg setup.py LICENSE README.md ./
COPY xaiproxy xaiproxy
COPY conf/supervisord.conf conf/
COPY conf/clients conf/clients
RUN pip install --no-cache-dir --no-deps --no-build-isolation --use-pep517 . && pip check && rm -rf /src/*
COPY conf/supervisord.conf /etc/xaiproxy/

# The folder of the login and of an optional .env; nothing else is written to.
USER 10001:10001
WORKDIR /data
VOLUME /data
ENV XAI_PROXY_TOKEN_PATH=/data/tokens.json

# The proxy listens on the container's loopback unless XAI_PROXY_BIND is set.
EXPOSE 9090
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["python", "-c", "import http.client, os, sys; from xaiproxy import config; c = config.from_environ(os.environ); h = http.client.HTTPConnection(c.bind, c.port, timeout=3); h.request('GET', '/healthz'); sys.exit(h.getresponse().status != 200)"]

# When stopped, open streams get 25 s, and then a refresh in progress gets 30 s: docker run --stop-timeout 70
CMD ["supervisord", "-c", "/etc/xaiproxy/supervisord.conf"]
