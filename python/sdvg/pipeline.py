"""`SDVGPipeline`: the loop as a diffusers pipeline, from one folder or from loose checkpoints."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanTransformer3DModel,
)
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from sdvg import arguments
from sdvg.commit import Recompute, policy
from sdvg.engine import SDVG, Generation
from sdvg.host import device_of
from sdvg.models.checkpoints import load_transformer, read_json
from sdvg.models.linear import Fp8Linear
from sdvg.models.vae import StreamingVAE, encode
from sdvg.models.wan import CausalWan
from sdvg.recipes import recipe as settings_of
from sdvg.router import Reward
from sdvg.schedule import Schedule
from sdvg.types import Block, Decoder, Router, Scorer, Stats, Verdict

# frames of a latent frame but the first
TIME = 4
OUTPUTS = ("np", "pt", "pil", "latent")
Media = Tensor | np.ndarray | Image.Image | Sequence[object]


@dataclass
class SDVGPipelineOutput(BaseOutput):
    """What a call returns.

    frames: "np" `[B, N, H, W, 3]` and "pt" `[B, N, 3, H, W]` in [0, 1]; "pil" a list of images for
        each prompt; "latent" `[B, F, C, h, w]`.
    verdicts: for each block a verdict per prompt.
    stats: what `summary()` says.
    """

    frames: np.ndarray | Tensor | list[list[Image.Image]]
    verdicts: list[tuple[Verdict, ...]]
    stats: Stats


class SDVGPipeline(DiffusionPipeline):
    """Text-to-video by speculation: a small drafter proposes blocks, a large target repairs them.

    Drafter and target are stock `WanTransformer3DModel`s with weights distilled for
    block-autoregressive generation (Self-Forcing, LongLive, Krea Realtime). The scorer is any
    callable `(frames [B, N, 3, H, W] in [0, 1], prompts) -> rewards [B, N]`; one with
    `save_pretrained` and `from_pretrained` is saved and loaded with the pipeline.

    Args:
        tokenizer, text_encoder: UMT5 and its tokenizer.
        vae: Wan's causal autoencoder, decoded block by block.
        scheduler: kept for its flow shift; the loop's steps are a `Schedule`.
        drafter, transformer: either may be None, then the other makes every block.
        scorer: needed by routers that look at rewards (the default one does).
        height, width: of a video unless the call says otherwise, in pixels.
        frames_per_block: latent frames.
        sink_frames, window_frames: first latent frames, which are always seen, and how far back a
            block sees beside them, itself included.
        drafter_window_frames: the drafter's own window; None: the same.
        past_weight: what the target's past keys weigh in the softmax (Krea Realtime: 0.3).
        max_sequence_length: tokens of a prompt; longer ones are cut.
        schedule: denoising steps, a preset's name.
        commit: when kept blocks enter the target's cache, see `SDVG`; its name.

    Raises:
        ValueError: parts or sizes that do not fit each other, in one sentence.
    """

    model_cpu_offload_seq = "text_encoder->drafter->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["drafter", "transformer"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        drafter: WanTransformer3DModel | None,
        transformer: WanTransformer3DModel | None,
        scorer: Callable | None = None,
        height: int = 480,
        width: int = 832,
        frames_per_block: int = 3,
        sink_frames: int = 0,
        window_frames: int = 21,
        drafter_window_frames: int | None = None,
        past_weight: float = 1.0,
        max_sequence_length: int = 512,
        schedule: str = "self_forcing",
        commit: str | Recompute = "lazy",
    ) -> None:
        super().__init__()
        settings = {
            "height": height, "width": width, "frames_per_block": frames_per_block,
            "sink_frames": sink_frames, "window_frames": window_frames,
            "drafter_window_frames": drafter_window_frames, "past_weight": past_weight,
            "max_sequence_length": max_sequence_length, "schedule": schedule,
            "commit": str(policy(commit)),
        }  # fmt: skip
        arguments.require_settings(**settings)
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler,
            drafter=drafter, transformer=transformer,
        )  # fmt: skip
        self.scorer = scorer
        self.register_to_config(scorer=_name_of(scorer), **settings)
        # pixels of a latent: 8, Wan 2.2's 5B has 16
        self._space: int = vae.config.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self._space)
        self._generation: Generation | None = None
        self._acceleration: dict[str, dict[str, bool]] | None = None
        self._decoder: StreamingVAE | None = None
        # around each transformer, as long as its sizes stay
        self._models: dict[str, tuple[tuple[object, ...], CausalWan]] = {}
        # the prompts that both models ask for
        self._encoded: dict[tuple[str, ...], Tensor] = {}

    def accelerate(self, *, graphs: bool = False, fp8: bool = False) -> SDVGPipeline:
        """Run the models on the fused ops from the next video on; see `sdvg.accelerate`."""
        plain = {"graphs": graphs}
        self._acceleration = {"drafter": plain, "transformer": plain | {"fp8": fp8}, "vae": plain}
        return self

    def to(self, *args: object, **kwargs: object) -> SDVGPipeline:
        """Move or convert all parts, as diffusers does; the scorer is moved, never converted."""
        super().to(*args, **kwargs)
        for given in (*args, kwargs.get("device")):
            if isinstance(given, str | torch.device) and isinstance(self.scorer, torch.nn.Module):
                self.scorer.to(given)
        return self

    def place(self, **devices: torch.device | str) -> SDVGPipeline:
        """Move parts to devices of their own; return the pipeline.

        The loop moves prompts, latents and frames between them without a wait of the host. The
        paper's split is `pipe.to("cuda:0").place(text_encoder="cuda:1", vae="cuda:1",
        scorer="cuda:1")`. A drafter on a GPU of its own drafts while the target repairs, where a
        call allows it with `run_ahead`.

        Args:
            devices: text_encoder, drafter, transformer, vae, scorer: device.

        Raises:
            TypeError, ValueError: another part, a missing one, or one that cannot be moved.
            RuntimeError: a part that is offloaded.
        """
        names = ("text_encoder", "drafter", "transformer", "vae", "scorer")
        for name in devices:
            if name not in names:
                raise TypeError(
                    f"pipeline: place must name parts among {', '.join(names)}, got {name!r}"
                )
            part = getattr(self, name)
            if not isinstance(part, torch.nn.Module):
                raise ValueError(
                    f"pipeline: {name} must be a torch module to be placed, "
                    f"got {type(part).__name__}"
                )
            if hasattr(part, "_hf_hook"):
                raise RuntimeError(
                    f"pipeline: {name} must not be offloaded to be placed; "
                    "call remove_all_hooks() first"
                )
        arguments.require_devices(**devices)
        for name, device in devices.items():
            getattr(self, name).to(device)
        return self

    def enable_sequential_cpu_offload(self, *args: object, **kwargs: object) -> None:
        """Refuse: a layer's weights are read outside of its own forward."""
        raise _no_layerwise_offload("enable_sequential_cpu_offload")

    def enable_group_offload(self, *args: object, **kwargs: object) -> None:
        """Refuse: a layer's weights are read outside of its own forward."""
        raise _no_layerwise_offload("enable_group_offload")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: object) -> SDVGPipeline:
        """Load a folder (or a Hub repository) that `save_pretrained` wrote.

        `options` are diffusers' (`torch_dtype`, ...) and replacements of any part:
        `from_pretrained(folder, scorer=my_scorer)`. Raises ValueError where the folder names a
        scorer of another package and none is passed.
        """
        if not Path(folder).is_dir():
            folder = cls.download(arguments.repository("folder", folder))
        index = read_json(Path(folder) / "model_index.json", "pipeline")
        if "scorer" not in options and isinstance(index.get("scorer"), str):
            module, _, name = index["scorer"].rpartition(".")
            # a folder must not choose what code is run
            ours = module.startswith("sdvg.scorers.") and importlib.util.find_spec(module)
            scorer = getattr(importlib.import_module(module), name, None) if ours else None
            if not hasattr(scorer, "from_pretrained"):
                raise ValueError(
                    f"pipeline: {folder} names the scorer {index['scorer']}, which is not sdvg's; "
                    "load it yourself and pass it: from_pretrained(folder, scorer=...)"
                )
            options["scorer"] = scorer.from_pretrained(Path(folder) / "scorer")
        return super().from_pretrained(folder, **options)

    @classmethod
    def from_checkpoints(
        cls,
        *,
        base: str | Path,
        drafter: str | Path | WanTransformer3DModel | None = None,
        target: str | Path | WanTransformer3DModel | None = None,
        drafter_lora: str | Path | None = None,
        target_lora: str | Path | None = None,
        scorer: Scorer | None = None,
        recipe: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        drafter_device: torch.device | str | None = None,
        scorer_device: torch.device | str | None = None,
        **sizes: object,
    ) -> SDVGPipeline:
        """Build a pipeline from loose checkpoints: Self-Forcing's, Krea's, LongLive's, Wan's own.

        Args:
            base: a folder or Hub repository in diffusers' layout with tokenizer, text_encoder and
                vae (`Wan-AI/Wan2.1-T2V-1.3B-Diffusers`).
            drafter, target: files or folders that `sdvg.models.checkpoints.load_transformer`
                reads, or models; one of them may be None.
            drafter_lora, target_lora: low-rank updates, merged.
            scorer: see the class.
            recipe: the settings of "self_forcing", "longlive", "diagonal" (LongLive's model,
                diagonally distilled) or "krea" (`sdvg.recipes`); sizes that are given go before
                them.
            dtype, device: of the models; the autoencoder too.
            drafter_device: for a drafter on a GPU of its own (with `run_ahead` it then drafts while
                the target repairs); None: `device`.
            scorer_device: of what stands around the models: text encoder, autoencoder, scorer (the
                paper's second GPU); None: `device`, and the scorer stays where it lies. `place`
                moves each part alone.
            sizes: the class's own settings: height, window_frames, ...

        Raises:
            ValueError: a file that is missing, broken or another model's, in one sentence.
        """
        sizes = ({} if recipe is None else settings_of(recipe)) | sizes
        # before minutes of loading, not after
        arguments.require_settings(**sizes)
        arguments.require_devices(
            device=device, drafter_device=drafter_device, scorer_device=scorer_device
        )
        arguments.require_updates(drafter=(drafter, drafter_lora), target=(target, target_lora))
        base = arguments.require_base(base)
        beside = device if scorer_device is None else scorer_device

        def transformer(
            source: str | Path | WanTransformer3DModel | None,
            lora: str | Path | None,
            place: torch.device | str,
        ) -> WanTransformer3DModel | None:
            if source is None or isinstance(source, torch.nn.Module):
                return source
            return load_transformer(source, lora=lora, dtype=dtype, device=place)

        parts = {
            "tokenizer": AutoTokenizer.from_pretrained(base, subfolder="tokenizer"),
            "text_encoder": UMT5EncoderModel.from_pretrained(
                base, subfolder="text_encoder", dtype=dtype
            ).to(beside),
            "vae": AutoencoderKLWan.from_pretrained(base, subfolder="vae", dtype=dtype).to(beside),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
            "drafter": transformer(drafter, drafter_lora, drafter_device or device),
            "transformer": transformer(target, target_lora, device),
        }
        if scorer_device is not None and isinstance(scorer, torch.nn.Module):
            scorer.to(scorer_device)
        return cls(**parts, scorer=scorer, **sizes)

    def save_pretrained(self, folder: str | Path, **options: object) -> None:
        """Write every part in diffusers' layout; a scorer too, if it has `save_pretrained`.

        Raises ValueError for weights in e4m3: no reader of that layout knows them.
        """
        for name in ("drafter", "transformer"):
            part = getattr(self, name)
            if part is not None and any(isinstance(m, Fp8Linear) for m in part.modules()):
                raise ValueError(
                    f"pipeline: {name} must have its own weights to be saved, got e4m3; "
                    "save before accelerate(fp8=True)"
                )
        super().save_pretrained(folder, **options)
        if hasattr(self.scorer, "save_pretrained"):
            self.scorer.save_pretrained(Path(folder) / "scorer")

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        num_blocks: int = 9,
        image: Media | None = None,
        video: Media | None = None,
        height: int | None = None,
        width: int | None = None,
        tau: float = -0.7,
        router: Router | None = None,
        generator: arguments.Generator | Sequence[arguments.Generator] | None = None,
        schedule: Schedule | str | None = None,
        drafter_schedule: Schedule | str | None = None,
        commit: str | Recompute | None = None,
        drafter_cache: str = "own",
        force_first: bool = True,
        run_ahead: int = 0,
        in_flight: int = 1,
        preview: Decoder | None = None,
        **unknown: object,
    ) -> Stream:
        """Return an iterator that yields each block as soon as it is final.

        `next(stream).frames` are `[B, N, 3, H, W]` in [0, 1]; `stream.switch(prompt)` follows
        another prompt from the next block on; `stream.summary()` says how it went.

        Args:
            prompt: one text, or one for each video.
            num_blocks: blocks of a video, given ones included.
            image: `[B, 3, H, W]`, PIL or NumPy: held still, it is the first block (image-to-video).
            video: `[B, N, 3, H, W]` or lists of images: the first blocks (continuation); N must
                be 9, 21, 33, ... frames for blocks of three latent frames.
            height, width: pixels, multiples of 16.
            tau, router: the threshold of `Reward`, or any other router.
            generator: a number drawn from it keys the noise, so each call goes on in it; or that
                number itself, a seed; or a list of either, one for each prompt, whose videos are
                those that each gives alone. None: a number is drawn from torch's own generator.
            schedule, commit: None: the pipeline's own.
            drafter_schedule, drafter_cache, force_first, run_ahead, in_flight, preview: see `SDVG`;
                a preview is `sdvg.models.vae.TinyDecoder`, say.

        Raises:
            ValueError, TypeError: an argument that does not fit, in one sentence.
        """
        if unknown:
            raise arguments.foreign(unknown, self.stream, self.config.frames_per_block)
        prompts = arguments.texts(prompt)
        height = self.config.height if height is None else height
        width = self.config.width if width is None else width
        arguments.require_settings(height=height, width=width)
        given = self._given(image, video, len(prompts), height, width)
        chosen = policy(self.config.commit if commit is None else commit)
        passes = {}
        if isinstance(chosen, Recompute):
            # a pass of more than it rewrites would only make the ring longer
            passes["write_blocks"] = max(1, chosen.frames // self.config.frames_per_block)
        loop = SDVG(
            self._causal("drafter", height, width, self.config.drafter_window_frames),
            self._causal(
                "transformer", height, width, past_weight=self.config.past_weight, **passes
            ),
            self._streaming(),
            self.scorer,
            Reward(tau) if router is None else router,
            schedule=schedule or self.config.schedule, drafter_schedule=drafter_schedule,
            force_first=force_first, commit=chosen, drafter_cache=drafter_cache,
            run_ahead=run_ahead, in_flight=in_flight, preview=preview,
        )  # fmt: skip
        self._encoded.clear()
        self._generation = Stream(
            loop, prompts, num_blocks, arguments.seeds(generator), None, given
        )
        return self._generation

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_block_end: Callable[[SDVGPipeline, int, Block], None] | None = None,
        **options: object,
    ) -> SDVGPipelineOutput | tuple[object, ...]:
        """Make the whole video; `options` are those of `stream`.

        `callback_on_block_end(pipe, index, block)` is called with each finished block.
        `output_type` is "np", "pt", "pil" or "latent" (see `SDVGPipelineOutput`); without
        `return_dict`, (frames, verdicts, stats).
        """
        if output_type not in OUTPUTS:
            names = ", ".join(OUTPUTS)
            raise ValueError(f"pipeline: output_type must be one of {names}, got {output_type!r}")
        if callback_on_block_end is not None and not callable(callback_on_block_end):
            raise TypeError(
                "pipeline: callback_on_block_end must be callable, got "
                f"{type(callback_on_block_end).__name__}"
            )
        blocks = self.stream(prompt, **options)
        frames = []
        try:
            with self.progress_bar(total=blocks.num_blocks) as bar:
                for block in blocks:
                    if output_type != "latent":
                        frames.append(block.frames.cpu())
                    if callback_on_block_end is not None:
                        callback_on_block_end(self, block.index, block)
                    bar.update()
        finally:
            self.maybe_free_model_hooks()
        made = torch.cat(blocks.latents if output_type == "latent" else frames, dim=1)
        if output_type in ("np", "pil"):
            made = made.permute(0, 1, 3, 4, 2).numpy()
        if output_type == "pil":
            made = [self.video_processor.numpy_to_pil(video) for video in made]
        output = SDVGPipelineOutput(made, blocks.verdicts, blocks.summary())
        return output if return_dict else (output.frames, output.verdicts, output.stats)

    def summary(self, target_only_seconds: float | None = None) -> Stats:
        """Return acceptance, seconds by stage, FPS and speed-up of the latest video so far."""
        if self._generation is None:
            raise RuntimeError("pipeline: summary must follow a video, got none; call the pipeline")
        return self._generation.summary(target_only_seconds)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Return text embeddings `[B, L, dim]`, zero past each prompt's length, as Wan pads."""
        batch = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.config.max_sequence_length,
        )  # fmt: skip
        device = self._device_of(self.text_encoder)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        hidden = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden * mask[..., None]

    def _encode_once(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings that the other model of a stream has asked for, or new ones."""
        if (key := tuple(prompts)) not in self._encoded:
            self._encoded = {key: self.encode_prompt(prompts)}
        return self._encoded[key]

    def _device_of(self, part: torch.nn.Module) -> torch.device:
        """Return where a part computes; an offloaded one lies elsewhere."""
        offloaded = hasattr(part, "_hf_hook")
        return self._execution_device if offloaded else device_of(part, self.device)

    def _streaming(self) -> StreamingVAE:
        """Return the decoder of `self.vae`; the last one, if it is: it may hold captured graphs."""
        if self._decoder is None or self._decoder.vae is not self.vae:
            self._decoder = StreamingVAE(self.vae)
        if self._acceleration is not None:
            self._decoder.accelerate(**self._acceleration["vae"])
        return self._decoder

    def _causal(
        self,
        part: str,
        height: int,
        width: int,
        window_frames: int | None = None,
        past_weight: float = 1.0,
        **passes: int,
    ) -> CausalWan | None:
        """Return `self.drafter` or `self.transformer` with its cache; the last one, if it fits."""
        transformer = getattr(self, part)
        if transformer is None:
            return None
        arguments.require_fit(part, transformer, self.vae, self.text_encoder, height, width)
        # an offloaded model runs elsewhere than it lies; others run where the user has put them
        device = self._execution_device if hasattr(transformer, "_hf_hook") else None
        key = (transformer, height, width, device, self._acceleration, passes)
        known, model = self._models.get(part, (None, None))
        # a second pipeline may have taken a shared transformer over
        if known != key or not model.installed:
            if model is not None:
                # the latest video still holds it
                model.release()
            model = CausalWan(
                transformer, self._encode_once, height=height // self._space,
                width=width // self._space, frames=self.config.frames_per_block,
                sink_frames=self.config.sink_frames,
                window_frames=window_frames or self.config.window_frames,
                past_weight=past_weight, device=device, **passes,
            )  # fmt: skip
            if self._acceleration is not None:
                model.accelerate(**self._acceleration[part])
            self._models[part] = key, model
        return model

    @torch.no_grad()
    def _given(
        self, image: Media | None, video: Media | None, batch: int, height: int, width: int
    ) -> Tensor | None:
        """Return clean latents `[B, F, C, h, w]` of the first blocks, if any are given."""
        if image is not None and video is not None:
            raise ValueError("pipeline: image and video must not both be given, got both")
        first = 1 + TIME * (self.config.frames_per_block - 1)
        image, video = arguments.pixels("image", image), arguments.pixels("video", video)
        if image is not None:
            shown = self.video_processor.preprocess(image, height, width)
            shown = shown[:, :, None].expand(-1, -1, first, -1, -1)
        elif video is not None:
            shown = self.video_processor.preprocess_video(video, height, width)
        else:
            return None
        block = TIME * self.config.frames_per_block
        if shown.shape[2] < first or (shown.shape[2] - first) % block:
            raise ValueError(
                f"pipeline: video must have whole blocks, {first} + n * {block} frames, "
                f"got {shown.shape[2]}"
            )
        if len(shown) not in (1, batch):
            raise ValueError(
                f"pipeline: image or video must be one, or one for each of {batch} prompts, "
                f"got {len(shown)}"
            )
        latents = encode(self.vae, shown.to(self._device_of(self.vae)))
        return latents.expand(batch, -1, -1, -1, -1)


class Stream(Generation):
    """The loop of `SDVGPipeline.stream`."""

    def switch(self, prompt: str | Sequence[str], *, recache: str = "window") -> None:
        """Follow another prompt, cleaned as a call does; see `Generation.switch`."""
        super().switch(arguments.texts(prompt), recache=recache)


def _no_layerwise_offload(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"pipeline: {name} must not be called, a layer's weights are read outside of its own "
        "forward; call enable_model_cpu_offload()"
    )


def _name_of(scorer: object) -> str | None:
    """Return where a scorer that can be saved comes from: `package.module.Class`."""
    if scorer is None or not hasattr(scorer, "save_pretrained"):
        return None
    return f"{type(scorer).__module__}.{type(scorer).__qualname__}"
