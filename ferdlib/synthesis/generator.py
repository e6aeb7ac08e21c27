"""The image generator of the CMI, Fast, DFHL and FERD lineage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ferdlib import _checks
from ferdlib._checks import InvalidType, InvalidValue, got, public


class Generator(nn.Module):
    """Map from latent codes to images in [0, 1]: a linear layer, two nearest-neighbour doublings, a sigmoid.

    Linear to 2w maps of H/4 x W/4 and BatchNorm; twice doubling, 3x3 convolution, BatchNorm and
    LeakyReLU(0.2); a 3x3 convolution to the image's channels. With `num_classes` a label embedding is
    concatenated to the code; the papers' releases run it without.

    Args:
        image_shape: `(C, H, W)` with H and W divisible by 4.
        latent_dim: size of a latent code.
        width: w, channels before the last convolution.
        num_classes: K for a label-conditional generator, None for an unconditional one.

    Raises:
        TypeError, ValueError: a shape that is not three positive integers with H and W divisible by
            4, or numbers out of range.

    Example:
        >>> generator = Generator((1, 8, 8), latent_dim=16, width=8)
        >>> generator(torch.randn(5, 16)).shape
        torch.Size([5, 1, 8, 8])
    """

    @public
    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        latent_dim: int = 100,
        width: int = 64,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(image_shape, (tuple, list)):
            raise InvalidType(f"expected `image_shape` (C, H, W), got {got(image_shape)}")
        if len(image_shape) != 3:
            raise InvalidValue(f"expected `image_shape` (C, H, W), got {got(image_shape)}")
        channels, height, breadth = image_shape
        for side in image_shape:
            _checks.integer(1, image_shape=side)
        if height % 4 or breadth % 4:
            raise InvalidValue(
                f"expected `image_shape` with height and width divisible by 4, got {tuple(image_shape)}"
            )
        _checks.integer(1, latent_dim=latent_dim, width=width)
        self.latent_dim = latent_dim
        self.embedding: nn.Embedding | None = None
        if num_classes is not None:
            _checks.integer(2, num_classes=num_classes)
            self.embedding = nn.Embedding(num_classes, latent_dim)
        # A label's embedding is as long as the code that it is put behind.
        inputs = latent_dim if num_classes is None else 2 * latent_dim
        self.project = nn.Linear(inputs, 2 * width * (height // 4) * (breadth // 4))
        self.decode = nn.Sequential(
            nn.Unflatten(1, (2 * width, height // 4, breadth // 4)),
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    @public
    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Make images `(N, C, H, W)` in [0, 1] of codes `(N, latent_dim)` and, if conditional, labels."""
        _checks.floating(latents=latents)
        if latents.ndim != 2 or latents.shape[1] != self.latent_dim:
            raise InvalidValue(
                f"expected `latents` of shape (N, {self.latent_dim}), got {tuple(latents.shape)}"
            )
        if self.embedding is not None:
            if labels is None:
                raise InvalidValue("expected `labels` for a conditional generator, got None")
            _checks.labels(labels=labels, num_classes=self.embedding.num_embeddings, like=latents)
            latents = torch.cat([latents, self.embedding(labels)], dim=1)
        images: Tensor = self.decode(self.project(latents))
        return images

    @public
    @torch.no_grad()
    def reset(self, rng: torch.Generator | None = None) -> None:
        """Draw every parameter anew by the lineage's rule, and forget the running statistics.

        Linear and convolution weights N(0, 0.02), BatchNorm weights N(1, 0.02), biases 0, label
        embeddings N(0, 1); drawn on the generator's device, or on the parameters' without one.
        """
        _checks.generator(rng)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                self._normal(module.weight, 0.0, 0.02, rng)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                self._normal(module.weight, 1.0, 0.02, rng)
                module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                self._normal(module.weight, 0.0, 1.0, rng)

    @staticmethod
    def _normal(weight: Tensor, mean: float, std: float, rng: torch.Generator | None) -> None:
        device = weight.device if rng is None else rng.device
        draw = torch.randn(weight.shape, generator=rng, device=device, dtype=weight.dtype)
        weight.copy_(mean + std * draw)
