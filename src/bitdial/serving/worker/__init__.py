"""Workers: a model on its engine in a process of its own, several of them supervised, and what their batches cost.

Messages between processes are JSON and tensors lie in shared memory; nothing is pickled. The server's process imports no engine,
and a worker's process nothing of the server's (so this module names nothing).
"""
