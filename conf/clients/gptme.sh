# gptme: source it (. gptme.sh); then: gptme -m local/grok-4.5
export OPENAI_BASE_URL=http://127.0.0.1:9090/v1
export OPENAI_API_KEY="${XAIPROXY_KEY:-none}"
