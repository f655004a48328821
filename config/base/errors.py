"""The errors that a user sees: one line each, and exit status 2 (`console.run_script`)."""


class UserError(Exception):
    """Something that the user can mend. Its text is one line: what is wrong, which file, what to do."""


class BadArgument(UserError):
    """An argument, a setting or a combination of these that cannot be."""


class MissingFile(UserError):
    """A file, a folder or a package that is not there, or is empty."""


class DamagedFile(UserError):
    """A file that cannot be read, or is of another kind than it should be."""


class Mismatch(UserError):
    """Two things that do not belong together: a checkpoint and a network, the halves of a pair."""


class NotWritable(UserError):
    """A file or a folder that cannot be written."""


class Occupied(UserError):
    """A place that holds something else already, or a run that another process trains."""


class NotFinite(UserError):
    """A loss, weights or an output that are infinite or nan."""


class OutOfMemory(UserError):
    """A device's memory, or the disk in its place, that is too small."""


class LostProcess(UserError):
    """Another process of the same run that has ended."""
