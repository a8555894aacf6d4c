"""Other stores' classes on top of ``SnapshotStore``: change an import, keep the calls. See ``compat.omlx``."""
