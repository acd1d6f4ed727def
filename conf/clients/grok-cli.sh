# grok-cli of vibe-kit, whose command is also called grok: source it (. grok-cli.sh) before `grok`.
export GROK_BASE_URL=http://127.0.0.1:9090/v1
export GROK_API_KEY="${XAIPROXY_KEY:-none}"
export GROK_MODEL=grok-4.5
