"""Lines of the log where they can be watched: Weights & Biases, TensorBoard (`log=wandb`, `log=tensorboard`).

Both are handed what metrics.jsonl and timings.jsonl are, and nothing depends on them: what fails there is said once,
and the run goes on. `live.json` in the run directory holds what a continuation needs: the run's id at W&B, and the last
step that was handed over, so that no step comes twice and none is missing, also where a run begins with one logger and
goes on with another.
"""

import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import UserError
from pipeline.train.options import Logger, LogOptions
from pipeline.train.run_log import Line

logger = logging.getLogger(__name__)

NOTE = "live.json"

INIT_SECONDS, FINISH_SECONDS = 30.0, 60.0
"""How long W&B may take to begin, and to send the rest at the end."""

WANDB_ONLY = ("project", "entity", "group", "tags", "mode")


class Live(Protocol):
    """Something that shows lines elsewhere."""

    def begin(self, before: int, done: int) -> int:
        """Open it. before: the last step that it was handed, -1 for none; done: the last that counts, since later ones
        are taken again. -> the last step that it need not be handed."""

    def add(self, step: int, numbers: dict[str, float]) -> None: ...

    def end(self, exit_code: int) -> None: ...

    def failures(self) -> tuple[type[Exception], ...]:
        """What it raises when something is wrong there."""


def check(options: LogOptions) -> None:
    """UserError where the logger cannot work: its package is missing, nobody is logged in, a setting has no meaning."""
    if options.name is not Logger.wandb:
        for key in WANDB_ONLY:
            if getattr(options, key):
                raise UserError(f"log.{key} has no meaning for log={options.name}; add log=wandb, or leave it out")
    if options.name is Logger.default:
        return
    found = find_spec(options.name)
    # A folder of that name where one stands, which W&B makes by itself, passes for a package without an origin.
    if found is None or found.origin is None:
        raise UserError(f"log={options.name} needs {options.name}; run: pip install {options.name}")
    if options.name is Logger.wandb and _mode(options) == "online":
        _check_login()


def _check_login() -> None:
    """Whether there is a key; whether it is the right one shows when the run begins, since that takes the network."""
    import wandb

    fix = "run: wandb login, or add log.mode=offline and send it later"
    try:
        if not wandb.login(prompt=False, verify=False):
            raise UserError(f"log=wandb: nobody is logged in at W&B; {fix}")
    except wandb.errors.AuthenticationError as error:
        raise UserError(f"log=wandb: {_line(error)}; {fix}") from error


@contextmanager
def live(options: LogOptions, directory: Path, name: str, config: dict[str, Any]) -> Iterator[list["Guarded"]]:
    """The loggers of a run, which are closed at its end, however that comes. name: of the run; config: its settings."""
    if options.name is Logger.default:
        yield []
        return
    to_wandb = options.name is Logger.wandb
    shown = Wandb(options, directory, name, config) if to_wandb else TensorBoard(directory, config)
    guarded = Guarded(shown, directory, options.name)
    exit_code = 1
    try:
        yield [guarded]
        exit_code = 0
    except KeyboardInterrupt:
        exit_code = 130
        raise
    finally:
        guarded.end(exit_code)


class Guarded:
    """A logger that stops no run: what fails there is said, once, and nothing more is handed over."""

    def __init__(self, shown: Live, directory: Path, name: str) -> None:
        self._shown, self._note, self._name = shown, Note(directory, name), name
        self._works, self._has = False, -1

    def begin(self, lines: Sequence[tuple[Line, Line]]) -> None:
        """Lines of steps that count, metrics and times, from the first on: those that are not there yet are added."""
        with self._guard():
            self._has = self._shown.begin(self._note.step, lines[-1][0]["step"] if lines else -1)
            for metrics, times in lines:
                self._add(metrics, times)
            self._works = True

    def add(self, metrics: Line, times: Line) -> None:
        """A line that was just written."""
        if self._works:
            with self._guard():
                self._add(metrics, times)

    def end(self, exit_code: int) -> None:
        if self._works:
            with self._guard():
                self._shown.end(exit_code)

    def _add(self, metrics: Line, times: Line) -> None:
        if metrics["step"] <= self._has:
            return
        numbers = {name: value for name, value in {**metrics, **times}.items() if value is not None and name != "step"}
        self._shown.add(metrics["step"], numbers)
        self._note.step = metrics["step"]

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except self._shown.failures() as error:
            self._works = False
            logger.warning(
                "log=%s has failed and shows nothing more of this run, which goes on: %s", self._name, _line(error)
            )


class Note:
    """What `live.json` says of one logger."""

    def __init__(self, directory: Path, name: str) -> None:
        self._file, self._name = directory / NOTE, name

    @property
    def step(self) -> int:
        """The last step that was handed over; -1 for none."""
        return int(self._read().get("step", -1))

    @step.setter
    def step(self, step: int) -> None:
        self._write(step=step)

    @property
    def id(self) -> str | None:
        """Of the run at W&B."""
        return self._read().get("id")

    def new_id(self, name: str) -> str:
        """Of the run's name, and what tells it from other runs of that name."""
        made = f"{re.sub(r'[^0-9A-Za-z]+', '-', name)[:50]}-{secrets.token_hex(4)}"
        self._write(id=made)
        return made

    def _read(self) -> dict[str, Any]:
        return self._all().get(self._name, {})

    def _all(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # a loss of power may leave it empty
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, **values: object) -> None:
        everything = self._all()
        everything[self._name] = everything.get(self._name, {}) | values
        aside = self._file.with_name(NOTE + ".aside")
        aside.write_text(json.dumps(everything) + "\n")
        aside.replace(self._file)


class TensorBoard:
    """Event files in runs/NAME/tensorboard/. Numbers are float32 there: the other form that they could have, readers do
    not purge of steps that are taken again."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self._folder, self._config = directory / "tensorboard", config

    def begin(self, before: int, done: int) -> int:
        from torch.utils.tensorboard import SummaryWriter

        begun = before >= 0 and self._folder.exists()
        keep = min(before, done) if begun else -1
        # What an earlier process wrote of later steps is not shown.
        self._writer = SummaryWriter(self._folder, purge_step=keep + 1)
        if not begun:
            self._writer.add_text("config", "    " + json.dumps(self._config, indent=2).replace("\n", "\n    "))
        logger.info("tensorboard: tensorboard --logdir %s", self._folder)
        return keep

    def add(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a process that is killed loses no line

    def end(self, exit_code: int) -> None:
        self._writer.close()

    def failures(self) -> tuple[type[Exception], ...]:
        return (OSError,)


class Wandb:
    """A run at W&B, or offline in runs/NAME/wandb/. A process of its own sends lines, keeps them while there is no
    network, and tries again."""

    def __init__(self, options: LogOptions, directory: Path, name: str, config: dict[str, Any]) -> None:
        self._options, self._directory, self._name, self._config = options, directory, name, config
        self._note = Note(directory, Logger.wandb)

    def begin(self, before: int, done: int) -> int:
        import wandb

        mode = _mode(self._options)
        try:
            self._run = self._init(mode)
        except wandb.errors.AuthenticationError as error:
            raise UserError(
                f"log=wandb: {_line(error)}; run: wandb login --relogin, or add log.mode=offline"
            ) from error
        except wandb.errors.CommError as error:
            logger.warning("log=wandb: W&B cannot be reached, so this goes on offline: %s", _line(error))
            # The id that was asked for is taken now, in this process: another run, with all lines from the first on.
            self._note.new_id(self._name)
            mode, before = "offline", -1
            self._run = self._init(mode)
        except wandb.Error as error:
            raise UserError(f"log=wandb: {_line(error)}; mend that, or add log.mode=offline") from error
        if mode == "online":
            logger.info("wandb: %s", self._run.url)
            # What it holds, W&B knows better than the note of a process that may have been killed.
            return int(self._run.starting_step) - 1 if self._run.resumed else -1
        logger.info("wandb: %s; to send it: wandb sync %s", mode, self._folder())
        return before

    def _init(self, mode: Any) -> Any:
        import wandb

        options = self._options
        settings = wandb.Settings(
            console="off", silent=True, init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        )  # fmt: skip
        return wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group or (os.path.dirname(self._name) or None),
            tags=options.tags or None,
            name=self._name,
            id=self._note.id or self._note.new_id(self._name),
            resume="allow",
            mode=mode,
            dir=self._directory,
            config=self._config,
            allow_val_change=True,
            reinit="create_new",
            settings=settings,
        )

    def _folder(self) -> Path:
        return Path(self._run.dir).parent

    def add(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def end(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            folder = self._folder()
            logger.warning("log=wandb: not everything was sent; the rest is kept: wandb sync %s", folder)

    def failures(self) -> tuple[type[Exception], ...]:
        import wandb

        return (OSError, wandb.Error)


def _mode(options: LogOptions) -> str:
    """online, offline or disabled: of the settings, else as WANDB_MODE says."""
    return str(options.mode or os.environ.get("WANDB_MODE") or "online")


def _line(error: Exception) -> str:
    """In one line."""
    return " ".join(str(error).split()) or type(error).__name__
