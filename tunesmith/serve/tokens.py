"""/tokenize and /detokenize: what the model reads, without asking it anything."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from tunesmith.serve.conversation import check_switch, check_switches, plain_messages
from tunesmith.serve.errors import JsonResponse, unsupported
from tunesmith.serve.schema.tokens import DetokenizeRequest, TokenizeRequest
from tunesmith.serve.state import Server
from tunesmith.serve.tools import template_tools


async def tokenize(server: Server, body: TokenizeRequest) -> Response:
    """The ids of a text or of a conversation."""
    server.adapter_of(body.model)
    server.engine.check_up()
    if body.messages is None:
        ids = await server.text.encode(
            body.prompt or "", add_special=body.add_special_tokens is not False, param="prompt"
        )
    else:
        ids = await _chat_ids(server, body)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": server.max_model_len, "tokens": ids}
    answer["token_strs"] = [server.text.tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
    return JsonResponse(answer)


async def _chat_ids(server: Server, body: TokenizeRequest) -> list[int]:
    switches = dict(body.chat_template_kwargs or {})
    check_switches(server.text, switches)
    if body.add_special_tokens:
        raise unsupported("add_special_tokens", "add_special_tokens: the template writes the special tokens itself")
    if body.tools:
        check_switch(server.text, "tools", "tools")
        switches["tools"] = template_tools([tool.model_dump(exclude_none=True) for tool in body.tools], None)
    if body.add_generation_prompt is False:
        switches["add_generation_prompt"] = False
    continues = bool(body.continue_final_message)
    messages = plain_messages(body.messages or [], server.text)
    prompt = await server.text.chat_prompt(messages, switches, continues=continues, param="messages")
    return await server.text.prompt_ids(prompt, "messages")


async def detokenize(server: Server, body: DetokenizeRequest) -> Response:
    """The text of ids, special tokens written out."""
    server.adapter_of(body.model)
    server.engine.check_up()
    ids = server.text.check_ids(body.tokens, int(server.engine.facts["vocab_size"]), "tokens")
    return JsonResponse({"prompt": await server.text.decode(ids, skip_special=False)})
