"""The chat templates of the checkpoints that can be exported, as data.

The export writes the one that a checkpoint's config.json names into the bundle, where
``runtime.text.template.ChatTemplate`` reads it.
"""

from __future__ import annotations

from export.errors import CheckpointError

TEMPLATES: dict[str, dict[str, object]] = {
    # From OpenGVLab/Mono-InternVL: the conversation of this name, and the image tokens and labels ("图" is
    # "picture") of `multi_image_chat`. All its chat functions end an answer at the separator alone.
    "internlm2-chat": {
        "name": "internlm2-chat",
        "system_prefix": "<|im_start|>system\n",
        "system_message": (
            "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
            "是一个有用无害的人工智能助手。"
        ),
        "user_prefix": "<|im_start|>user\n",
        "assistant_prefix": "<|im_start|>assistant\n",
        "separator": "<|im_end|>",
        "stop_tokens": ["<|im_end|>"],
        "image_start": "<img>",
        "image_end": "</img>",
        "image_context": "<IMG_CONTEXT>",
        "image_label": "<image {number}> (图{number}):",
    },
}
"""By the value of the config key ``template``: the keys of ``ChatTemplate``, in JSON types."""


def template(name: str) -> dict[str, object]:
    """Returns the template that a checkpoint's config key ``template`` names.

    Raises:
        CheckpointError: there is none of that name; the message lists those there are.
    """
    if name not in TEMPLATES:
        known = ", ".join(map(repr, sorted(TEMPLATES)))
        raise CheckpointError(
            f"config.json: template must be one of {known}, got {name!r}: add it to export/checkpoint/templates.py"
        )
    return dict(TEMPLATES[name])
