"""Serving on Ray Serve: replicas on many machines, each with its engine and its own dial, and a number of replicas that follows
the load.

Two controllers act on the same load, and they must not fight:

- The dial of each replica looks at that replica's queue and acts at once, batch by batch, at the price of some accuracy.
- The autoscaler looks at the work that arrives at all replicas together, counted in 8-bit seconds per second, and acts within
  minutes, at the price of machines.

An autoscaler that looks at queue lengths, latency or processor load, as is usual, sees what is left after the dial has acted: the
dial shortens the queue, so no replicas come, and the accuracy stays low for as long as the load lasts; or replicas are taken away
while the dial is up, which turns it further up. Here the autoscaler's input does not depend on the dial: it is the arrival rate,
refused requests included, times the service time at the smallest ratio (`scaling`). So there is no loop through which the two
could swing:

    burst             -> the dial turns up at once
    burst lasts       -> replicas = ceil(work / utilization), after the up-delay and the time that replicas take to start
    replicas are here -> each one's queue is short, so its dial returns to the smallest ratio by itself
    burst ends        -> replicas go after the long down-delay, and only if fewer would also do with some more work

`scaling` is the rule (pure; no Ray), `deployment` the application, its options and its life, `replica` what runs on the cluster's
machines. Ray's HTTP proxy spreads requests; every replica answers the same inference protocol as `bitdial serve`, from the same
code, and holds the bounded queue that pushes back: Ray is told to send a replica more requests than that queue holds.
"""

from bitdial.serving.ray.scaling import ScalingSettings, WorkMeter, WorkPolicy, decide

__all__ = ["ScalingSettings", "WorkMeter", "WorkPolicy", "decide"]
