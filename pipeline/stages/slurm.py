"""Jobs that submitit starts (`hydra/launcher=submitit_slurm`, `submitit_local`): their ranks, their requeueing, and the
file that Slurm is given. Loads submitit where there is such a job alone."""

import os
import signal
from collections.abc import Mapping
from typing import Any


def export_ranks() -> None:
    """In a task of a job of several: say in the environment which of them this is, as torchrun does."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    import submitit

    if submitit.JobEnvironment().num_tasks > 1:
        # A task may see the GPUs of its node or its own alone: the mesh chooses by LOCAL_RANK.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def requeue() -> None:
    """In a job that was told to make room and has its checkpoint: let submitit put it into the queue again, which
    the first of its tasks does, and leave."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        handler = signal.getsignal(number)
        if callable(handler):
            handler(number, None)  # ends the first task
    raise SystemExit(130)


def sbatch_text(launcher: Mapping[str, Any], n_jobs: int) -> str:
    """The file that submitit hands to sbatch for so many jobs, from the settings of Hydra's launcher. Needs no
    Slurm."""
    from submitit.slurm.slurm import SlurmExecutor

    class Here(SlurmExecutor):
        """Which asks for no srun."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    own = {"_target_", "submitit_folder", "max_num_timeout"}
    given = {name: value for name, value in launcher.items() if name not in own and value is not None}
    executor = Here(folder=launcher["submitit_folder"], max_num_timeout=launcher["max_num_timeout"])
    executor.update_parameters(**executor._convert_parameters(given))
    if n_jobs > 1:
        executor.parameters["map_count"] = n_jobs
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text
