# shell-gpt: source it (. shell-gpt.sh) before `sgpt`
export API_BASE_URL=http://127.0.0.1:9090/v1
export OPENAI_API_KEY="${XAIPROXY_KEY:-none}"
export DEFAULT_MODEL=grok-4.5
