"""What SGLang answers to requests that cannot be served."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from tests.requests import CHAT, LONG_CHAT, MAX_MODEL_LEN, VOCABULARY, Bad

BAD_REQUESTS = {
    "prompt over the limit": Bad(400, "The input (300 tokens) is longer", changes={"prompt": [5] * 300}),
    "chat over the limit": Bad(400, "context length (256 tokens)", CHAT, LONG_CHAT),
    "no room for an answer": Bad(400, "context length (256 tokens)", changes={"prompt": [5] * MAX_MODEL_LEN}),
    "empty prompt": Bad(400, "Prompt cannot be empty", changes={"prompt": []}),
    "temperature in words": Bad(400, "unable to parse string as a number", changes={"temperature": "hot"}),
    "negative temperature": Bad(400, "temperature must be a non-negative", changes={"temperature": -1}),
    "negative max_tokens": Bad(400, "max_tokens must be positive", changes={"max_tokens": -1}),
    "negative max_tokens in a chat": Bad(400, "must be at least 0, got -1", CHAT, {"max_tokens": -1}),
    "top_p over 1": Bad(400, "top_p must be in (0, 1], got 2.0", changes={"top_p": 2}),
    "no answers asked for": Bad(400, "must not be zero", changes={"n": 0}),
    "token outside the vocabulary": Bad(
        400, f"Token id {VOCABULARY} is out of vocabulary", changes={"prompt": [5, VOCABULARY, 6]}
    ),
    "token beyond 64 bits": Bad(400, "exceeded maximum size", changes={"prompt": [5, 2**70]}),
    "negative token": Bad(400, "Token id -1 is out of vocabulary", changes={"prompt": [5, -1]}),
    "bias on a token outside the vocabulary": Bad(
        400, f"got {VOCABULARY}", changes={"logit_bias": {str(VOCABULARY): 1}}
    ),
    "token outside the vocabulary in a stream": Bad(
        400, "is out of vocabulary", changes={"prompt": [5, VOCABULARY], "stream": True}
    ),
    "stop token outside the vocabulary": Bad(
        400, f"Token id {VOCABULARY} is out of", changes={"stop_token_ids": [VOCABULARY], "min_tokens": 1}
    ),
    "more logprobs than there are tokens": Bad(400, f"{10**6} is more than the", changes={"logprobs": 10**6}),
    "role that there is not": Bad(
        400, "'role' must be one of", CHAT, {"messages": [{"role": "robot", "content": "beep"}]}
    ),
    "chat without messages": Bad(400, "Messages cannot be empty", CHAT, {"messages": []}),
    "malformed JSON": Bad(400, "JSON decode error", content='{"model": '),
    "no body": Bad(400, "Field required", content=""),
}
