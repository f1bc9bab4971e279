"""A model as the scripts see it: a network with its tokenizer, made, loaded, saved and copied.

The networks are in backends/torch and backends/mlx, which are twins. `choose_backend` is the one
place that chooses between them. A saved model is a Hugging Face folder, an adapter a PEFT folder.
"""

import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from backends.adapter_files import (
    CONFIG_FILE,
    Adapter,
    Arrays,
    Shapes,
    adapter_shapes,
    find_base_folder,
    read_peft_adapter,
    read_trained_on,
    write_mlx_adapter,
    write_peft_adapter,
)
from backends.config import LoRAConfig, ModelConfig
from backends.initialization import initial_adapter, initial_weights
from backends.model_files import (
    add_tags,
    read_checkpoint,
    read_config,
    read_tokenizer,
)
from common import ranks
from common.errors import UserError
from common.files import refuse_damage, replace_folder, write_checksums, writing
from common.settings import ModelSettings
from data.trajectory import TAGS, Codec

if TYPE_CHECKING:
    # It takes seconds to import, which --help need not wait for.
    from transformers import PreTrainedTokenizerFast

# What starts several processes that work together (common/ranks.py), by backend.
LAUNCHERS = {"torch": "torchrun", "mlx": "mlx.launch"}


class LM:
    """A network with its tokenizer: what the scripts pass around."""

    def __init__(
        self,
        network: Any,
        tokenizer: "PreTrainedTokenizerFast",
        backend: ModuleType,
        folder: Path | None = None,
    ) -> None:
        """Raise UserError for a tokenizer that has more entries than the network.

        network: the Transformer of a backend.
        backend: the module backends.torch or backends.mlx.
        folder: where the whole weights lie: these, or those that its adapter belongs to.
        """
        self.network = network
        self.codec = Codec(tokenizer, network.config.eos_token_ids)
        self.backend = backend
        self.folder = folder
        if len(tokenizer) > network.config.vocab_size:
            raise UserError(
                f"model: the tokenizer has {len(tokenizer)} entries, "
                f"the network {network.config.vocab_size}; they are not a pair"
            )

    def decoder(self, prompts: list[list[int]]) -> Any:
        """Return a decoder of this backend, which has read the prompts (backends/decoder.py)."""
        return self.backend.Decoder(self.network, prompts)

    def copy(self) -> "LM":
        """Return a model that training this one does not change; frozen weights are shared."""
        network = self.backend.copy_network(self.network)
        return LM(network, self.codec.tokenizer, self.backend, self.folder)

    # ---- saving and going on ---------------------------------------------------------------------
    def save(self, folder: Path, optimizer: Any = None, steps_done: int | None = None) -> None:
        """Write a Hugging Face folder, or the folder of an adapter: whole or not at all.

        Of several processes the first writes, and the others do not wait for it.
        optimizer: its state goes with it, for a stage that goes on from here.
        steps_done: steps of the stage; in RL a step may be several of the optimizer, or none.
        Raises DiskError where the disk refuses.
        """
        if ranks.is_first():
            self._write(folder, optimizer, steps_done)
        if not self.network.lora:
            self.folder = folder

    def _write(self, folder: Path, optimizer: Any, steps_done: int | None) -> None:
        partial = folder.with_name(folder.name + ".partial")
        tokenizer = self.codec.tokenizer
        # How it was read would make the files of a resumed run others.
        for name in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(name, None)
        with writing(partial):
            partial.mkdir(parents=True, exist_ok=True)
            tokenizer.save_pretrained(partial)
            config = self.network.config.to_dict()
            (partial / "config.json").write_text(json.dumps(config, indent=2))
            if self.network.lora:
                self._save_adapter(partial)
            else:
                self.backend.save_weights(self.network, partial)
            if optimizer:
                state = optimizer.state()
                if steps_done is not None:
                    state["done"] = np.array([steps_done])
                save_file(state, partial / "optimizer.safetensors")
            write_checksums(partial)
            replace_folder(folder, partial)

    def resume(self, folder: Path, optimizer: Any = None) -> int | None:
        """Read the weights, and the optimizer's state, that `save` wrote with either backend.

        Returns how many steps of the stage were done (the optimizer's own count where `save` was
        given none), None without an optimizer.
        Raises UserError where they are of another network or optimizer, or not as they were saved.
        """
        refuse_damage(folder, "train its stage again")
        if read_config(folder) != self.network.config:
            raise _other_content(folder, "another network than this run's")
        has_adapter = (folder / CONFIG_FILE).is_file()
        if self.network.lora and not has_adapter:
            raise _other_content(folder, "all weights, and this run trains an adapter")
        if has_adapter and not self.network.lora:
            raise _other_content(folder, "an adapter, and this run trains all weights")
        if has_adapter:
            adapter = self._read_adapter(folder)
            if adapter.lora != self.network.lora:
                raise _other_content(folder, "another kind of adapter than this run's")
            self.backend.add_adapter(self.network, adapter.lora, adapter.parameters)
        else:
            self.backend.load_weights(self.network, folder)
        if not optimizer:
            return None
        path = folder / "optimizer.safetensors"
        try:
            state = load_file(path)
            steps_done = state.pop("done", state.get("step"))
            optimizer.load_state(state)
        except (KeyError, OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is not this optimizer's state: {error}; "
                f"repeat the settings it was begun with, or remove {folder}"
            ) from None
        assert steps_done is not None, "load_state has read the step count"
        return int(steps_done[0])

    # ---- adapters --------------------------------------------------------------------------------
    def begin_stage(self, settings: ModelSettings, seed: int, stage: str = "") -> None:
        """Prepare the network for a stage of training: checkpointing, 4 bits, an adapter.

        A network that has no adapter yet gets one if settings.lora_rank says so.
        stage: its name, so that with --lora_merge the adapter of each stage begins with an A of
        its own.
        Raises UserError for settings that contradict the adapter that is there.
        """
        self.network.recompute = settings.checkpointing
        if not settings.lora_rank:
            if self.network.bits < 16 and not self.network.lora:
                raise UserError(
                    f"--bits={self.network.bits}: weights of {self.network.bits} bits can't be "
                    "trained; train an adapter on them with --lora_rank=16"
                )
            return
        lora = LoRAConfig(
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            targets=list(settings.lora_targets),
            tokens=self._tag_ids(),
        )
        if self.network.lora:
            _refuse_other_adapter(self.network.lora, lora)
            return
        if settings.bits < 16 and self.network.bits == 16:
            self.backend.quantize(self.network, settings.bits)
        rng = np.random.default_rng([seed, *stage.encode()])
        parameters = initial_adapter(self._adapter_shapes(lora), rng)
        for name, rows in self._frozen_rows(lora).items():
            parameters[f"{name}.rows"] = rows
        self.backend.add_adapter(self.network, lora, parameters)

    def base_precision(self) -> str:
        """Return how the frozen weights are kept, which an adapter learns to go with."""
        if self.network.bits == 16:
            return "16 bits or more"
        if self.backend.NAME == "mlx":
            return "MLX's 4 bits"
        return "bitsandbytes' 4 bits (NF4)"

    def _save_adapter(self, folder: Path) -> None:
        """Write PEFT's files, and those of mlx_lm in a folder of their own."""
        names = self.backend.trained_parameters(self.network)
        parameters = self.backend.to_arrays(self.network, names)
        adapter = Adapter(self.network.lora, parameters)
        embeddings = self.backend.embeddings(self.network)
        write_peft_adapter(folder, adapter, self.folder, embeddings, self.base_precision())
        frozen_rows = self._frozen_rows(adapter.lora)
        write_mlx_adapter(folder / "mlx_lm", adapter, self.network.config, frozen_rows)

    def _read_adapter(self, folder: Path) -> Adapter:
        return read_peft_adapter(folder, self.folder, self._adapter_shapes)

    def _tag_ids(self) -> list[int]:
        ids = self.codec.tokenizer.convert_tokens_to_ids(list(TAGS.values()))
        assert isinstance(ids, list)
        return sorted(ids)

    def _adapter_shapes(self, lora: LoRAConfig) -> Shapes:
        linears = self.backend.block_linears(self.network)
        embeddings = self.backend.embeddings(self.network)
        return adapter_shapes(self.network.config, lora, linears, embeddings)

    def _frozen_rows(self, lora: LoRAConfig) -> Arrays:
        """Return the trained tokens' embeddings without the adapter, (tokens, hidden) each."""
        names = list(self.backend.embeddings(self.network))
        weights = self.backend.to_arrays(self.network, [f"{name}.weight" for name in names])
        return {name: weights[f"{name}.weight"][lora.tokens] for name in names}


def _other_content(folder: Path, content: str) -> UserError:
    return UserError(
        f"{folder} holds {content}; repeat the settings it was begun with, or remove it"
    )


def _refuse_other_adapter(current: LoRAConfig, wanted: LoRAConfig) -> None:
    """Raise UserError where the settings ask for another adapter than the network has."""
    for name in ("rank", "alpha", "dropout", "targets"):
        current_value = getattr(current, name)
        wanted_value = getattr(wanted, name)
        if current_value != wanted_value:
            raise UserError(
                f"--lora_{name}={wanted_value}: what this run starts from has an adapter with "
                f"{name} {current_value}; repeat that, or begin at a stage without an adapter"
            )


# ---- where models come from ----------------------------------------------------------------------
def choose_backend(name: str = "auto") -> ModuleType:
    """Return the backend of this name; this is the one place that chooses a framework.

    auto takes MLX on Apple silicon and torch elsewhere, or the one that is installed. Where a
    launcher has started several processes, they meet here.
    Raises UserError for one that is not installed, and for the launcher of the other.
    """
    if name == "auto":
        name = _default_backend()
    if name not in ("torch", "mlx"):
        raise UserError(f"--backend: {name!r} is not one of auto, torch, mlx")
    if ranks.launcher() not in ("", LAUNCHERS[name]):
        raise UserError(
            f"--backend={name}: {ranks.launcher()} starts processes of the other one; start them "
            f"with {LAUNCHERS[name]}"
        )
    package = name
    if name == "mlx" and sys.platform == "linux":
        package = "'mlx[cpu]'"
    if importlib.util.find_spec(name) is None:
        other = "mlx" if name == "torch" else "torch"
        raise UserError(
            f"--backend={name}: {name} is not installed; pip install {package}, "
            f"or take --backend={other}"
        )
    # Lets CUDA merge freed blocks, so that texts of varying lengths do not fragment its memory. It
    # is read when torch is imported.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        if name == "mlx":
            import backends.mlx as backend
        else:
            import backends.torch as backend
    except ImportError as error:
        raise UserError(
            f"--backend={name}: {name} is installed but can't be imported ({error}); "
            f"pip install --force-reinstall {package}"
        ) from None
    backend.join_ranks()
    return backend


def fast_dtype(settings: ModelSettings) -> Literal["float32", "bfloat16"]:
    """Return the number type in which a checkpoint runs fastest on the device of the settings.

    Raises UserError for a backend or a device that is not there.
    """
    backend = choose_backend(settings.backend)
    return backend.fast_dtype(backend.pick_device(settings.device))


def sizes_by_device(settings: ModelSettings) -> dict[str, int]:
    """Return settings, by name, whose defaults are too small for a nano model on its device.

    Raises UserError for a backend or a device that is not there.
    """
    backend = choose_backend(settings.backend)
    return backend.sizes_by_device(backend.pick_device(settings.device))


def _default_backend() -> str:
    if importlib.util.find_spec("mlx") is None:
        return "torch"
    on_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    if on_apple_silicon or importlib.util.find_spec("torch") is None:
        return "mlx"
    return "torch"


def new(
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerFast",
    seed: int,
    settings: ModelSettings,
) -> LM:
    """Return a new model, ready to learn all its weights."""
    backend = choose_backend(settings.backend)
    device = backend.pick_device(settings.device)
    network = backend.build(config, device, _number_type(settings))
    weights = initial_weights(config, backend.parameter_shapes(network), seed)
    backend.set_weights(network, weights, "initial weights")
    return LM(network, tokenizer, backend)


def load(folder: str | Path, settings: ModelSettings) -> LM:
    """Return the model of a folder that `LM.save` wrote.

    With settings.bits of 4, the blocks' matrices are kept in 4 bits.
    Raises UserError for a file that is not as it was saved, and an adapter whose base is not there.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is missing")
    backend = choose_backend(settings.backend)
    refuse_damage(folder, "train this stage again")
    base_folder = find_base_folder(folder)
    if base_folder != folder:
        refuse_damage(base_folder, "train this run again")
    network = _build_network(backend, read_config(base_folder), settings)
    backend.load_weights(network, base_folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"model: {folder / 'tokenizer.json'} is missing; "
            "copy it from another stage of the run, or train this one again"
        )
    lm = LM(network, read_tokenizer(folder), backend, base_folder)

    adapter = None
    if base_folder != folder:
        adapter = lm._read_adapter(folder)
    if settings.bits < 16:
        backend.quantize(network, settings.bits)
    if adapter:
        backend.add_adapter(network, adapter.lora, adapter.parameters)
        _report_other_precision(folder, lm.base_precision())
    return lm


def load_pretrained(name: str, settings: ModelSettings) -> LM:
    """Return the model of a checkpoint from elsewhere, with the tags added to it.

    name: a Hugging Face folder, a hub id, or a GGUF file, which transformers reads with torch.
    Its weights are not quantized, whatever settings.bits says: they become a stage's folder.
    """
    backend = choose_backend(settings.backend)
    checkpoint = read_checkpoint(name, backend)
    add_tags(checkpoint, backend)
    network = _build_network(backend, checkpoint.config, settings)
    backend.set_weights(network, checkpoint.weights, checkpoint.source)
    return LM(network, checkpoint.tokenizer, backend)


def load_any(name: str, settings: ModelSettings) -> tuple[LM, bool]:
    """Return a model and whether it had the tags.

    name: a folder that `LM.save` wrote, or a checkpoint from elsewhere, which may have none.
    """
    # The folder of an adapter that another program trained has no config.json.
    files = [Path(name) / "config.json", Path(name) / "tokenizer.json"]
    tag = f'"{TAGS["search"]}"'.encode()
    if all(path.is_file() for path in files) and tag in files[1].read_bytes():
        return load(name, settings), True
    lm = load_pretrained(name, settings)
    if settings.bits < 16:
        lm.backend.quantize(lm.network, settings.bits)
    return lm, False


def _build_network(backend: ModuleType, config: ModelConfig, settings: ModelSettings) -> Any:
    """Return a network whose weights are still to be put in."""
    device = backend.pick_device(settings.device)
    # Weights that only carry an adapter are frozen, and never take four bytes each.
    frozen = settings.lora_rank > 0
    return backend.build(config, device, _number_type(settings), frozen)


def _number_type(settings: ModelSettings) -> str:
    """Return the type of --dtype; what no script has settled (runs.settle_by_device) is float32."""
    return "float32" if settings.dtype == "auto" else settings.dtype


def _report_other_precision(folder: Path, precision: str) -> None:
    """Say so where an adapter goes onto a base of another precision than it was trained on."""
    trained_on = read_trained_on(folder) or precision
    if trained_on != precision:
        print(
            f"{folder} was trained on a base of {trained_on}, and goes onto one of {precision} "
            "now: not quite the same network (--bits, --backend)"
        )
