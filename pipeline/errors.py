"""The exceptions that are no bugs of ours; `UserError` means: the user can mend this."""


class UserError(Exception):
    """Wrong input, a missing file, a full disk: something the user can mend.

    The message is a single line that names the cause and the fix. The command line prints it without a trace and
    leaves with exit code 2; in a sweep it fails its own job only. Everything else that is raised is our bug.
    """


class Preempted(KeyboardInterrupt):
    """The machine asks for its place back (SIGUSR1, SIGUSR2). A checkpoint is there; the job is to be queued again."""


class LostPeers(Exception):
    """Another rank of the run is gone, and this one cannot go on alone. Why it is gone, that one says."""
