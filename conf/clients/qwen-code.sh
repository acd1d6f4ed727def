# Qwen Code: source it (. qwen-code.sh); then: qwen --auth-type openai. It ignores NO_PROXY, so unset HTTPS_PROXY as well.
export OPENAI_BASE_URL=http://127.0.0.1:9090/v1
export OPENAI_API_KEY="${XAIPROXY_KEY:-none}"
export OPENAI_MODEL=grok-4.5
