"""Engines that load snapstore by configuration: ``integrations.sglang`` and ``integrations.vllm``.

Each module subclasses an abstract class of its engine, so it can be imported only where that engine is. State, files,
quota and cleanup are ``snapstore.blocks``' and so ``SnapshotStore``'s.
"""
