"""The errors that a user sees: one line each and exit status 2 (`console.run_script`)."""


class UserError(Exception):
    """Something that the user can fix. Its text is one line: what is wrong, in which file, what to do."""


class BadArgument(UserError):
    """An argument, a setting or a combination of these that is not possible."""


class MissingFile(UserError):
    """A file, folder or package that is missing or empty."""


class DamagedFile(UserError):
    """A file that cannot be read or is of the wrong kind."""


class Mismatch(UserError):
    """Two things that do not fit together: a checkpoint and a network, an image and the patch size."""


class NotWritable(UserError):
    """A file or folder that cannot be written."""


class BadName(NotWritable):
    """A file's name that its file system does not take: too long, of other characters, or a folder's."""


class Occupied(UserError):
    """A place that is taken: by other files, or by another process that trains the run."""


class NotFinite(UserError):
    """A loss, weights or an output that is infinite or nan."""


class OutOfMemory(UserError):
    """Too little memory on a device or in the machine."""


class LostProcess(UserError):
    """Another process of the same run has ended."""
