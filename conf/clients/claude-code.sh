# Claude Code: source it (. claude-code.sh) before `claude`. It uses xAI's /v1/messages, which is deprecated at xAI and
# has no count_tokens.
export ANTHROPIC_BASE_URL=http://127.0.0.1:9090  # without /v1
export ANTHROPIC_AUTH_TOKEN="${XAIPROXY_KEY:-none}"
unset ANTHROPIC_API_KEY
export ANTHROPIC_MODEL=grok-4.5 ANTHROPIC_SMALL_FAST_MODEL=grok-4.5
export ANTHROPIC_DEFAULT_OPUS_MODEL=grok-4.5 ANTHROPIC_DEFAULT_SONNET_MODEL=grok-4.5
export ANTHROPIC_DEFAULT_HAIKU_MODEL=grok-4.5
export CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1
