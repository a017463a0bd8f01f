"""The benchmark: workloads as data, times next to a floor and to the peers, one JSON document."""
