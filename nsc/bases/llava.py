"""The body of LLaVA's architecture without host syncs: token embeddings, projected image features, language model.

transformers' own forward compares counts of placeholders and features within a step, which no CUDA graph can hold.
Here each token is told beforehand which feature takes its place, so the same values come of gathers alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nsc.errors import NSCError

BEHIND_TOWER = ("multi_modal_projector", "language_model")
OTHER_INPUTS = ("vision_config", "audio_config", "video_config")  # of a config with a language model beside them


class ImageTextBody(nn.Module):
    """The parts of a LLaVA under their own names, fed with image features instead of pixels.

    Args:
        model: what transformers loads; kept as ``stock``, with which all parts are shared.

    Raises:
        NSCError: for a model that lacks one of these parts.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""  # PEFT asks, where an adapter of this body itself is loaded

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if lacking := [part for part in BEHIND_TOWER if not hasattr(model, part)]:
            raise NSCError(f"{type(model).__name__} has no {lacking[0]}: {_ONLY}")
        for name, part in model.named_children():
            self.add_module(name, part)
        self.config: Any = model.config
        self.__dict__["stock"] = model  # no submodule: its parts are ours

    @property
    def text(self) -> nn.Module:
        """The language model's body: transformers 4 has an LM head around it."""
        return self.language_model.base_model  # type: ignore[return-value, union-attr]

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings of the text's tokens, as transformers' models do.

        Returns:
            The language model's own layer.
        """
        return self.text.get_input_embeddings()  # type: ignore[operator, no-any-return]

    @property
    def image_token(self) -> int:
        """The id of the placeholders."""
        return image_token_of(self.config)  # type: ignore[return-value]  # it is required

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor | None = None,
        place: Tensor | None = None,
        use_cache: bool = False,
        **text: Any,
    ) -> Any:
        """Run the language model on token embeddings, with image features in place of the placeholders.

        Args:
            input_ids: (b, L) int64.
            features: (b, I, P, h), P features of each of the I images of a row; None for texts alone.
            place: (b, L) int64, which of the row's I x P features stands at a token; -1 for a text token. Given with
                ``features``.
            use_cache: whether keys and values are kept, to generate an answer.
            text: further arguments of the language model.

        Returns:
            What the language model returns, first its last hidden states (b, L, d).
        """
        embedded = self.text.get_input_embeddings()(input_ids)  # type: ignore[operator]
        if features is None or place is None:
            return self.text(inputs_embeds=embedded, use_cache=use_cache, **text)
        projected = self.multi_modal_projector(features.flatten(0, 1))  # type: ignore[operator]
        projected = projected.reshape(len(features), -1, embedded.shape[-1]).to(embedded)
        index = place.clamp_min(0)[..., None].expand_as(embedded)
        inputs = torch.where((place >= 0)[..., None], projected.gather(1, index), embedded)
        return self.text(inputs_embeds=inputs, use_cache=use_cache, **text)


_ONLY = (
    "nsc feeds images with text to models of LLaVA's structure (a tower whose hidden states vision_feature_layer picks,"
    " multi_modal_projector, language_model)"
)


def is_llava(config: Any) -> bool:
    """Return whether a model puts hidden states of an image tower where its text has placeholders, as LLaVA does.

    Args:
        config: config of the body.

    Returns:
        Whether it does; not where images come in tiles, whose number depends on the image.
    """
    placeholders = hasattr(config, "vision_config") and image_token_of(config) is not None
    return placeholders and hasattr(config, "vision_feature_layer") and not hasattr(config, "image_grid_pinpoints")


def image_token_of(config: Any) -> int | None:
    """Return the id of the image placeholder.

    Args:
        config: config of the body, from transformers 4 or 5.

    Returns:
        The token id, or None if there is no placeholder.
    """
    return getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)


def without_images(config: Any) -> str | None:
    """Return why a model that takes more than text is fed with texts alone.

    Args:
        config: config of the body.

    Returns:
        The reason; None for a model that is fed with all that it takes.
    """
    kind = config.model_type
    if is_llava(config) or not any(hasattr(config, name) for name in OTHER_INPUTS):
        return None
    if hasattr(config, "image_grid_pinpoints"):
        return f"{kind} cuts images in tiles, whose number depends on the image: not supported; {_ONLY}"
    if hasattr(config, "vision_config"):
        return f"{kind} has no vision_feature_layer: the tokens of its images are made otherwise; {_ONLY}"
    return f"{kind} takes more than text and images: not supported; {_ONLY}"


def refuse_moving_tower(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse adapters that change the image tower, which runs only once per image.

    Args:
        model: the body.
        names: modules that adapters change.

    Raises:
        NSCError: naming the first module inside the tower.
    """
    if isinstance(model, ImageTextBody):
        inside = [name for name in names if not name.startswith(BEHIND_TOWER)]
        if inside:
            raise NSCError(
                f"{inside[0]} and {len(inside) - 1} more layers of the image tower are changed by an adapter, but its"
                " features are made once and kept; train with target_modules inside the language model only"
            )


def places(here: Tensor) -> Tensor:
    """Return which image feature stands at each token.

    Args:
        here: (b, L) bool, where the placeholders are.

    Returns:
        (b, L) int64: the number of the row's feature, -1 for a text token.
    """
    return torch.where(here, here.cumsum(-1) - 1, -1)
