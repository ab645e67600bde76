"""The contestants of the latency benchmark, each in a process of its own, and the networks they run."""
