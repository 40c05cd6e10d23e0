"""From prompts to token ids: through the chat template of a tokenizer, or as they stand."""

from collections.abc import Sequence
from typing import Any

from prime_fast.data.shapes import decoded, text_of

OURS = (
    "messages",
    "conversation",
    "tools",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
)


class Template:
    """How prompts become token ids.

    mode: "chat", through the tokenizer's chat template, a text being one message of the user; "raw", as they stand,
        which a text and the content of a single message can; "auto", raw where the tokenizer has no chat template and
        for texts in a row's `prompt`, else chat.
    arguments: of the chat template, such as {"enable_thinking": False}; a row's `chat_template_kwargs` override them.

    A begun answer at the end of the messages is continued. What is raw gets the special tokens that the tokenizer adds
    to any text, for most a BOS or none, and not a second BOS; what a chat template wrote gets none.
    """

    def __init__(self, tokenizer: Any, mode: str = "auto", arguments: dict[str, Any] | None = None):
        self.tokenizer, self.mode, self.arguments = tokenizer, mode, arguments or {}
        self.source = str(tokenizer.chat_template or "")
        if mode == "chat" and not self.source:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: take an instruct model's, put a "
                "chat_template.jinja into its directory, or set data.template to raw"
            )
        for name in self.arguments:
            if name in OURS:
                raise ValueError(f"data.template_args cannot set {name}, which follows from the rows")
            if name not in self.source:
                raise ValueError(
                    f"data.template_args sets {name}, unknown to the chat template of {tokenizer.name_or_path!r}"
                )

    def apply(self, row: dict, shape: str) -> tuple[str, bool]:
        """The text of a row's prompt, and whether it stands raw; ValueError, a sentence without its subject."""
        prompt = row["prompt"]
        is_text = isinstance(prompt, str)
        if is_text and shape == "verl" and self.mode == "auto":
            raise ValueError(
                f'has a prompt that is no list of {{"role", "content"}} messages but str {prompt!r:.60}: set '
                "data.template to chat if it is a user's message, to raw if the model is to read it as it stands"
            )
        if self.mode == "raw" or (self.mode == "auto" and (is_text or not self.source)):
            return (prompt if is_text else self._only_text(prompt)), True
        return self._chat([{"role": "user", "content": prompt}] if is_text else prompt, row), False

    def ids(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Token ids of what `apply` gave."""
        found: list[list[int]] = [[] for _ in texts]
        for raw in (False, True):
            places = [place for place, (_, is_raw) in enumerate(texts) if is_raw is raw]
            if places:
                given = [texts[place][0] for place in places]
                made = self.tokenizer(given, add_special_tokens=raw)["input_ids"]
                for place, text, ids in zip(places, given, made, strict=True):
                    found[place] = self._whole(text, ids) if raw else ids
        return found

    def _whole(self, text: str, ids: list[int]) -> list[int]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token
        if eos and ids[-1:] == [self.tokenizer.eos_token_id] and not text.rstrip().endswith(eos):
            raise ValueError(
                f"the tokenizer of {self.tokenizer.name_or_path!r} ends every text with {eos}, after which no response "
                "would follow; set add_eos_token to false in its tokenizer_config.json"
            )
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _only_text(self, messages: list[dict]) -> str:
        if len(messages) == 1 and messages[0].get("content"):
            return text_of(messages[0]["content"])
        why = "data.template is raw" if self.mode == "raw" else "the tokenizer has no chat template"
        raise ValueError(
            f"has a prompt of {len(messages)} messages, which cannot stand as they are, and {why}: take a tokenizer "
            "with a chat template and data.template chat, or give the prompt as one text"
        )

    def _chat(self, messages: list[dict], row: dict) -> str:
        messages, tools = [_plain(message) for message in messages], _tools(row)
        for what, used in (("tools", tools), ("tool_calls", any(m.get("tool_calls") for m in messages))):
            if used and what not in self.source:
                raise ValueError(f"has {what}, which the chat template does not know: take a model made for tools")
        begun = ""
        if messages[-1]["role"] == "assistant":
            if messages[-1].get("tool_calls"):
                raise ValueError("has a prompt that ends in a tool call, without what the tool said")
            begun = messages[-1]["content"]
            messages = messages if begun else messages[:-1]
        own = decoded(row.get("chat_template_kwargs")) or {}
        if not isinstance(own, dict):
            raise ValueError(f"has chat_template_kwargs that are no object but {own!r:.60}")
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=bool(begun),
                **(self.arguments | own),
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(f"has a prompt that the chat template refuses: {' '.join(str(error).split())}") from error
        ending = begun[len(begun.rstrip()) :]
        return text if text.endswith(ending) else text + ending  # templates trim the content of a turn


def _plain(message: dict) -> dict:
    """A message as chat templates expect it: text for content, objects for the arguments of calls, no key without value
    but the content of a turn that only calls."""
    made = {key: value for key, value in message.items() if value is not None or key == "content"}
    if isinstance(made.get("content"), list):
        made["content"] = text_of(made["content"])
    if "tool_calls" in made:
        calls = decoded(made["tool_calls"])
        made["tool_calls"] = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    return made


def _call(call: Any) -> Any:
    if not isinstance(call, dict):
        raise ValueError(f"has a tool call that is no object but {call!r:.60}")
    if isinstance(function := call.get("function"), dict) and "arguments" in function:
        return call | {"function": function | {"arguments": decoded(function["arguments"])}}
    return call


def _tools(row: dict) -> list[dict] | None:
    tools = decoded(row.get("tools"))
    if not tools:
        return None
    schemas = [decoded(tool) for tool in tools] if isinstance(tools, list) else [None]
    if not all(isinstance(schema, dict) for schema in schemas):
        raise ValueError(f"has tools that are no list of JSON schemas but {tools!r:.60}")
    return schemas
