"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them: for programs that count or cut tokens themselves."""

import asyncio

from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from inference.engine import Engine
from serving.errors import ApiError, validated
from serving.forms import Loose
from serving.prompts import Prompts
from serving.schema import ChatRequest, Token


class TokenizeRequest(Loose):
    """A text, or a chat: then its other fields are those of ChatRequest."""

    prompt: str | None = None
    messages: list | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None

    def chat(self) -> ChatRequest:
        return validated(ChatRequest, {"model": ""} | self.model_dump(exclude_unset=True))


class DetokenizeRequest(Loose):
    tokens: list[Token] = Field(max_length=2**20)


class TokenRoutes:
    def __init__(self, engine: Engine, prompts: Prompts):
        self.engine, self.prompts, self.tokenizer = engine, prompts, engine.tokenizer
        # A text takes a hundred times its size while it is tokenised: one after the other.
        self.one = asyncio.Lock()

    async def tokenize(self, body: TokenizeRequest) -> JSONResponse:
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "tokenize takes a prompt or messages", param="prompt")
        async with self.one:
            ids = await run_in_threadpool(self._ids, body, body.chat() if body.messages is not None else None)
        names = self.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        answer = {"count": len(ids), "max_model_len": self.engine.context, "tokens": ids, "token_strs": names}
        return JSONResponse(answer)

    def _ids(self, body: TokenizeRequest, chat: ChatRequest | None) -> list[int]:
        if chat is not None:
            messages = [message.plain() for message in chat.messages]
            return self.prompts.rendered(messages, chat.offered, chat.thinking, chat.continued)
        try:
            if body.add_special_tokens:
                return self.engine.encode(body.prompt)  # as a completion reads it
            # Programs that write chats themselves come here: markers in the text are tokens.
            return self.tokenizer.encode(body.prompt, add_special_tokens=False)
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error), param="prompt") from None

    async def detokenize(self, body: DetokenizeRequest) -> JSONResponse:
        wrong = [token for token in body.tokens if token >= self.engine.vocab_size]
        if wrong:
            text = f"token id {wrong[0]} does not exist; ids run from 0 to {self.engine.vocab_size - 1}"
            raise ApiError(400, text, param="tokens")
        return JSONResponse({"prompt": await run_in_threadpool(self.tokenizer.decode, body.tokens)})

    async def info(self) -> JSONResponse:
        tokens = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        about = {"tokenizer_class": type(self.tokenizer).__name__, "model_max_length": self.engine.context}
        return JSONResponse(about | tokens | {"chat_template": self.tokenizer.chat_template})
