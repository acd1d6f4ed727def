# docker build -t xaiproxy .
#
# Arguments: BASE, Debian with Python and pip; VERSION and SOURCE, for the labels. No step depends on the architecture. A
# build with the BASE of a digest can be repeated, layer by layer: SOURCE_DATE_EPOCH=0 docker buildx build
# --build-arg BASE=python:3.13-slim@sha256:... --output type=docker,name=xaiproxy,rewrite-timestamp=true .
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/xaiproxy

# The requirements, in a layer that does not depend on xaiproxy's code.
WORKDIR /src
COPY conf/requirements.txt ./
# The bytecode that pip would make contains the time of the build.
RUN pip --python /opt/xaiproxy/bin/python install --no-compile --require-hashes --only-binary :all: \
    -r requirements.txt

COPY setup.cfg setup.py LICENSE README.md ./
COPY xaiproxy xaiproxy
COPY conf/supervisord.conf conf/
COPY conf/clients conf/clients
RUN pip --python /opt/xaiproxy/bin/python install --no-compile --no-deps --no-build-isolation \
        --use-pep517 . \
    && pip --python /opt/xaiproxy/bin/python uninstall --yes setuptools \
    && pip --python /opt/xaiproxy/bin/python check
COPY conf/healthcheck.py /opt/xaiproxy/
RUN python -m compileall -q -f --invalidation-mode unchecked-hash /opt/xaiproxy/lib && chmod -R a+rX /opt/xaiproxy

FROM ${BASE}
# The base has no bytecode of Python's own library, and the user below could not write it: each command would spend a
# second on compiling.
# The user's number is fixed, so that the owner of a mounted folder can be set from outside and runAsNonRoot can be
# checked. useradd would write the date of the build.
RUN rm -f /usr/bin/pip* /usr/local/bin/pip* \
    && find /usr -path '*/python3*' \( -name pip -o -name 'pip-*' -o -name ensurepip -o -name pkg_resources \
        -o -name setuptools -o -name 'setuptools-*' -o -name wheel -o -name 'wheel-*' \) -prune -exec rm -r {} + \
    && python -m compileall -q -f --invalidation-mode unchecked-hash -x '/(idlelib|lib2to3|tkinter|turtledemo|test)/' \
        "$(python -c 'import os; print(os.path.dirname(os.__file__))')" \
    && echo 'xaiproxy:x:10001:10001::/data:/usr/sbin/nologin' >>/etc/passwd \
    && echo 'xaiproxy:x:10001:' >>/etc/group \
    && install -d -o 10001 -g 10001 -m 0700 /data && install -d -o 10001 -g 10001 /run/xaiproxy
COPY --from=build /opt/xaiproxy /opt/xaiproxy
COPY conf/supervisord.conf /etc/xaiproxy/
ENV PATH=/opt/xaiproxy/bin:$PATH

# /data has the login and an optional .env. Nothing else is written, except a Unix socket that XAI_PROXY_BIND names, for
# which there is /run/xaiproxy. The root file system may be read-only.
USER 10001:10001
WORKDIR /data
VOLUME /data
# hadolint ignore=DL3064
ENV XAI_PROXY_TOKEN_PATH=/data/tokens.json
# supervisord requires a temporary folder, although it writes nothing there. Container runtimes provide this one even if
# the root file system is read-only.
ENV TMPDIR=/dev/shm
# The health check connects to it wherever XAI_PROXY_BIND has the proxy listen.
ENV XAI_PROXY_ADMIN_BIND=127.0.0.1:9091

# The proxy listens on the container's loopback unless XAI_PROXY_BIND is set.
EXPOSE 9090
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["python", "-I", "-S", "/opt/xaiproxy/healthcheck.py"]

# When stopped, open streams get 25 s, and then a refresh in progress gets 30 s: docker run --stop-timeout 70
CMD ["supervisord", "-c", "/etc/xaiproxy/supervisord.conf"]

ARG VERSION=0.1.0
ARG SOURCE
LABEL org.opencontainers.image.title=xaiproxy \
    org.opencontainers.image.licenses=MIT \
    org.opencontainers.image.version=$VERSION \
    org.opencontainers.image.source=$SOURCE
