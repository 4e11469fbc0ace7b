"""An object store in memory, in the place of the one that `gs://` is."""

from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """As there are no folders in it, an empty one can't be made, nor listed."""

    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    protocol = "gs"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))

    def mkdir(self, path, create_parents=True, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass
