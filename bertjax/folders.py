"""Finds the files that a model's folder may hold, and may as well lack."""

from pathlib import Path

from bertjax.convert.tensors import inside
from bertjax.errors import SourceError
from bertjax.json_files import check_regular


def find(folder: Path, name: str | Path) -> Path | None:
    """Returns the path of one of a model's files, or None where the folder has nothing of that name.

    What is there but is no file is not taken for absent: another file would be read in its place.

    Args:
        folder: the model's folder.
        name: the file's path in it.

    Raises:
        SourceError: it is no regular file, can't be read, or is a link to nothing or out of the folder.
    """
    try:
        path = inside(folder, name)
        check_regular(path)
    except SourceError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise SourceError(f"{path}: can't be read (it is a link to nothing)") from None
        return None
    except OSError as problem:
        raise SourceError(f"{path}: can't be read ({problem.strerror or problem})") from None
    except ValueError:  # a null character, which no name of a file has
        return None
    return path
