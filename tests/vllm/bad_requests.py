"""What vLLM answers to requests that cannot be served."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from tests.requests import CHAT, LONG_CHAT, MAX_MODEL_LEN, VOCABULARY, Bad

BAD_REQUESTS = {
    "prompt over the limit": Bad(400, "prompt contains 300 input tokens", changes={"prompt": [5] * 300}),
    "prompt over the limit, and the limit": Bad(400, "context length is 256 tokens", changes={"prompt": [5] * 300}),
    "chat over the limit": Bad(400, "context length is 256 tokens", CHAT, LONG_CHAT),
    "no room for an answer": Bad(400, "max_tokens must be at least 1", changes={"prompt": [5] * MAX_MODEL_LEN}),
    "empty prompt": Bad(400, "at least one prompt", changes={"prompt": []}),
    "unknown model": Bad(404, "`longcat-2` does not exist", changes={"model": "longcat-2"}),
    "unknown model in a chat": Bad(404, "`longcat-2` does not exist", CHAT, {"model": "longcat-2"}),
    "temperature in words": Bad(400, "body.temperature", changes={"temperature": "hot"}),
    "negative temperature": Bad(400, "temperature must be non-negative, got -1.0", changes={"temperature": -1}),
    "negative max_tokens": Bad(400, "max_tokens must be at least 1, got -1", changes={"max_tokens": -1}),
    "negative max_tokens in a chat": Bad(400, "max_tokens must be at least 1, got -1", CHAT, {"max_tokens": -1}),
    "top_p over 1": Bad(400, "top_p must be in (0, 1], got 2.0", changes={"top_p": 2}),
    "no answers asked for": Bad(400, "n must be at least 1, got 0", changes={"n": 0}),
    "first token outside the vocabulary": Bad(
        400, f"Token id {VOCABULARY} is out of vocabulary", changes={"prompt": [5, VOCABULARY, 6]}
    ),
    "token beyond 64 bits": Bad(400, "out of vocabulary", changes={"prompt": [5, 2**70]}),
    "negative token": Bad(400, "greater than or equal to 0", changes={"prompt": [5, -1]}),
    "bias on a token outside the vocabulary": Bad(
        400, f"Vocabulary size: {VOCABULARY}", changes={"logit_bias": {str(VOCABULARY): 1}}
    ),
    "stop token outside the vocabulary": Bad(
        400, "out-of-vocab", changes={"stop_token_ids": [VOCABULARY], "min_tokens": 1}
    ),
    "more logprobs than there are tokens": Bad(400, "max allowed", changes={"logprobs": 10**6}),
    "role that the chat template does not know": Bad(
        400,
        "role robot: wanted system, developer, user, assistant or tool",
        CHAT,
        {"messages": [{"role": "robot", "content": "beep"}]},
    ),
    "chat without messages": Bad(400, "at least one message", CHAT, {"messages": []}),
    "malformed JSON": Bad(400, "JSON decode error", content='{"model": '),
    "no body": Bad(400, "Field required", content=""),
}
