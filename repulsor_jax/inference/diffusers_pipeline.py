"""Draws images from a flow model with diffusers: noise to data by Euler's or Heun's method.

    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
    pipe([3, 7], generator=torch.Generator().manual_seed(0)).images[0].save("3.png")

`--mode=export` copies this file beside the weights; it needs torch and diffusers alone. Models of
latents of an autoencoder also need it: from_pretrained("FOLDER", vae=AutoencoderKL..., ...).
"""

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image


class FlowPipeline(DiffusionPipeline):
    """A `DiTTransformer2DModel` that predicts the velocity at t in [0, 1], 0 noise and 1 data.

    Args:
      transformer: the network.
      vae: the autoencoder, called as `vae.decode(latents).sample`; None where latents are pixels.
      latent_shift, latent_factor: the network sees (latents - shift) * factor, by channel.
      autoencoder: its name, for the error where it is missing; "identity" for pixels.
      classes: names of the labels.
    """

    _optional_components = ("vae",)

    def __init__(
        self,
        transformer,
        vae=None,
        latent_shift=(0.0,),
        latent_factor=(1.0,),
        autoencoder="identity",
        classes=(),
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(
            latent_shift=list(latent_shift),
            latent_factor=list(latent_factor),
            autoencoder=autoencoder,
            classes=list(classes),
        )
        # diffusers divides the exponents of the time's frequencies by 127, SiT and DiT by 128.
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0

    @torch.no_grad()
    def __call__(
        self,
        class_labels,
        num_inference_steps=50,
        guidance_scale=1.0,
        solver="heun",
        guidance_channels=0,
        latents=None,
        generator=None,
        output_type="pil",
    ):
        """Draws an image for each label.

        Args:
          class_labels: numbers, or names of `classes`.
          num_inference_steps: equal steps in t.
          guidance_scale: of classifier-free guidance; 1 is off.
          solver: "euler", "midpoint" or "heun".
          guidance_channels: guide so many leading channels (SiT: 3); 0 is all.
          latents: the noise [B, C, H, W], in place of that of `generator`.
          generator: of torch.
          output_type: "pil", or "pt" for float images [B, C, H, W] about [-1, 1].
        """
        config, device = self.transformer.config, self._execution_device
        names = {name: k for k, name in enumerate(self.config.classes)}
        labels = [names[k] if isinstance(k, str) else k for k in class_labels]
        labels = torch.tensor(labels, device=device)
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = torch.randn(shape, generator=generator)
        x = latents.to(device, torch.float32)

        def velocity(x, t):
            found = self._predict(x, t, labels)
            if guidance_scale == 1.0:
                return found
            nulls = torch.full_like(labels, config.num_embeds_ada_norm)
            weak = self._predict(x, t, nulls)
            guided = weak + guidance_scale * (found - weak)
            few = guidance_channels or config.in_channels
            return torch.cat([guided[:, :few], found[:, few:]], 1)

        times = np.arange(num_inference_steps + 1) / num_inference_steps
        for t, dt in zip(self.progress_bar(times[:-1]), np.diff(times), strict=True):
            first = velocity(x, t)
            if solver == "euler":
                x = x + dt * first
            elif solver == "midpoint":
                x = x + dt * velocity(x + 0.5 * dt * first, t + 0.5 * dt)
            elif solver == "heun":
                x = x + 0.5 * dt * (first + velocity(x + dt * first, t + dt))
            else:
                raise ValueError(f"solver: found {solver!r}, expected euler, midpoint or heun")
        images = self._decode(x)
        if output_type == "pt":
            return ImagePipelineOutput(images=images)
        pixels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)
        arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
        pictures = [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]
        return ImagePipelineOutput(images=pictures)

    def _predict(self, x, t, labels):
        network = self.transformer
        times = torch.full((len(x),), float(t), device=x.device)
        out = network(x.to(network.dtype), timestep=times, class_labels=labels).sample
        return out[:, : network.config.in_channels].float()

    def _decode(self, x):
        shift, factor = (
            torch.tensor(values, device=x.device).reshape(1, -1, 1, 1)
            for values in (self.config.latent_shift, self.config.latent_factor)
        )
        latents = x / factor + shift
        if self.vae is not None:
            return self.vae.decode(latents.to(self.vae.dtype)).sample.float()
        if self.config.autoencoder != "identity":
            raise ValueError(
                f"vae: found none, expected the autoencoder {self.config.autoencoder!r}: give it "
                "to from_pretrained, as vae=AutoencoderKL.from_pretrained(...)"
            )
        return latents
