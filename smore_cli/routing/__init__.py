"""Which experts the tokens use: collecting it from forward passes, and showing it."""

from smore_cli.routing.collect import RoutingCollector, collect_routing
from smore_cli.routing.statistics import RouterStatistics

__all__ = ["RouterStatistics", "RoutingCollector", "collect_routing"]
