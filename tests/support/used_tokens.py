"""Responses with a usage: a stream is a template, in which %b stands for more events."""

# Recorded from xAI, except the length of the texts.
CHAT = (
    b'{"id":"f98253a7-3f10-9b2f-99fa-4afa4ea58e06","object":"chat.completion","created":1788307428,'
    b'"model":"grok-4.5","choices":[{"index":0,"message":{"role":"assistant","content":"hello",'
    b'"reasoning_content":"The user wants me to reply with exactly one word: hello.","refusal":null},'
    b'"finish_reason":"stop"}],"usage":{"prompt_tokens":502,"completion_tokens":1,"total_tokens":516,'
    b'"prompt_tokens_details":{"text_tokens":502,"audio_tokens":0,"image_tokens":0,'
    b'"cached_tokens":384},"completion_tokens_details":{"reasoning_tokens":13,"audio_tokens":0,'
    b'"accepted_prediction_tokens":0,"rejected_prediction_tokens":0},"num_sources_used":0,'
    b'"cost_in_usd_ticks":4352000},"system_fingerprint":"fp_a39489019fa99b6e",'
    b'"service_tier":"default"}'
)
CHAT_STREAM = (
    b'data: {"id":"7327b9f5-1c2f-0a15-3fef-c14a71c460d3","object":"chat.completion.chunk",'
    b'"created":1770774058,"model":"grok-3-mini","choices":[{"index":0,"delta":{"content":"Hello"}}],'
    b'"system_fingerprint":"fp_2a885414fb"}\n\n%b'
    b'data: {"id":"7327b9f5","object":"chat.completion.chunk","created":1770774058,'
    b'"model":"grok-3-mini","choices":[],"usage":{"prompt_tokens":12,"completion_tokens":1,'
    b'"total_tokens":303,"prompt_tokens_details":{"text_tokens":12,"audio_tokens":0,"image_tokens":0,'
    b'"cached_tokens":5},"completion_tokens_details":{"reasoning_tokens":290,"audio_tokens":0},'
    b'"num_sources_used":0,"cost_in_usd_ticks":1466250},"system_fingerprint":"fp_2a885414fb"}\n\n'
    b"data: [DONE]\n\n"
)
RESPONSE_USAGE = (
    b'"usage":{"input_tokens":32,"input_tokens_details":{"cached_tokens":6},"output_tokens":100,'
    b'"output_tokens_details":{"reasoning_tokens":90},"total_tokens":132,"num_sources_used":0,'
    b'"num_server_side_tools_used":0,"cost_in_usd_ticks":1,"context_details":{"input_tokens":32,'
    b'"output_tokens":100},"server_side_tool_usage_details":{"web_search_calls":0}}'
)
RESPONSE = (
    b'{"created_at":1763853500,"id":"769f3302-64f9-4c72-2b48-860c87fd9b2a","max_output_tokens":null,'
    b'"model":"grok-code-fast-1","object":"response","output":[],"tools":[],%b,"user":null,'
    b'"incomplete_details":null,"status":"completed","store":true,"metadata":{}}' % RESPONSE_USAGE
)
RESPONSE_STREAM = (
    b'data: {"sequence_number":0,"type":"response.created","response":{"created_at":1763853500,'
    b'"id":"769f3302-64f9-4c72-2b48-860c87fd9b2a","max_output_tokens":null,'
    b'"model":"grok-code-fast-1","object":"response","output":[]}}\n\n%b'
    b'data: {"sequence_number":9,"type":"response.completed","response":' + RESPONSE + b"}\n\n"
)
MESSAGE = (
    b'{"id":"msg_1","type":"message","role":"assistant","model":"grok-4.5","content":[{"type":"text",'
    b'"text":"hello"}],"stop_reason":"end_turn","usage":{"input_tokens":10,'
    b'"cache_creation_input_tokens":3,"cache_read_input_tokens":20,"output_tokens":7}}'
)
MESSAGE_STREAM = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","type":"message",'
    b'"role":"assistant","model":"grok-4.5","content":[],"stop_reason":null,"usage":{'
    b'"input_tokens":10,"cache_creation_input_tokens":3,"cache_read_input_tokens":20,'
    b'"output_tokens":1}}}\n\n%b'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
    b'"usage":{"output_tokens":7}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
)
