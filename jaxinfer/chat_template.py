"""From a conversation to the text that a model was trained on, by the model's own template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jaxinfer.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    import jinja2


class ChatTemplates:
    """The chat templates of a tokenizer.

    templates: name → Jinja source; "default" is used, or "tool_use" if there are tools.
    source: the folder that they are from, for messages.
    """

    def __init__(self, templates: Mapping[str, str], source: str):
        self._templates = templates
        self._source = source
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        messages: `{"role": …, "content": …}` each.  add_generation_prompt: end where the answer
        begins.  tools: JSON schemas.  variables: what else the template may read.

        Raises `TokenizerError` if there is no template or it is broken, `RequestError` if it
        refuses the messages.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._compile(name)
        try:
            return template.render(
                **variables,
                messages=list(messages),
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template may raise anything
            raise RequestError(
                f"the chat template of {self._source} refuses the messages: {error}"
            ) from error

    def check(self) -> None:
        """Raise `TokenizerError` if there is no template, or it is broken."""
        self._compile("default")

    def _compile(self, name: str) -> jinja2.Template:
        import jinja2  # only who chats waits for it

        if name not in self._templates:
            found = f" called 'default' but {', '.join(self._templates)}" if self._templates else ""
            raise TokenizerError(
                f"{self._source} has no chat template{found}: give a plain prompt, or put a "
                "template into chat_template.jinja there"
            )
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self._templates[name])
            except jinja2.TemplateSyntaxError as error:
                raise TokenizerError(
                    f"the chat template of {self._source} is broken at line {error.lineno}: {error}"
                ) from error
        return self._compiled[name]


def _environment() -> jinja2.Environment:
    """Where chat templates run: sandboxed, with the names and the whitespace of transformers."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's text for training; here it is passed on."""

        tags = {"generation"}  # noqa: RUF012  # as the parent has it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson  # jinja's own escapes for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
