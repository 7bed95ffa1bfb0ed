"""A command line after its options are parsed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import ranks
from pipeline.errors import UserError


@dataclass(frozen=True)
class Request:
    """A command line after its options are parsed; the fields are Hydra's flags of the same names."""

    overrides: tuple[str, ...] = ()
    multirun: bool = False
    cfg: str | None = None
    resolve: bool = False
    config_dir: Path | None = None
    config_name: str | None = None
    info: str | None = None

    def argv(self, stage: str, words: Sequence[str]) -> list[str]:
        """The command line as Hydra wants it."""
        argv = [f"clt {stage.replace('_', ' ')}"]
        argv += ["--multirun"] if self.multirun else []
        argv += ["--resolve"] if self.resolve else []
        argv += ["--cfg", self.cfg] if self.cfg else []
        argv += ["--info", self.info] if self.info else []
        argv += ["--config-dir", str(self.config_dir)] if self.config_dir else []
        argv += ["--config-name", self.config_name] if self.config_name else []
        return argv + list(words)


def check_flags(request: Request) -> None:
    if request.config_dir and not request.config_dir.is_dir():
        raise UserError(f"--config-dir {request.config_dir}: no such directory")
    if request.resolve and not request.cfg:
        raise UserError("--resolve goes with --cfg; add --cfg job")
    if sum(map(bool, (request.multirun, request.cfg, request.info))) > 1:
        raise UserError("only one of --multirun, --cfg and --info can be given; leave the others out")
    if request.multirun and ranks.world() > 1:
        raise UserError(
            "-m runs one job after the other, and torchrun starts the ranks of one; leave -m out, or torchrun and add "
            "hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=N"
        )
