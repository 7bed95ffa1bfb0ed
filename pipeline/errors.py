"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Wrong input, a missing file, a full disk: something the user can mend.

    The message is a single line that names the cause and the fix. The command line prints it without a trace and
    leaves with exit code 2; in a sweep it fails its own job only. Everything else that is raised is our bug.
    """
