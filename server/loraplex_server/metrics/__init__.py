"""Every metric of the server, with bounded labels, and the page. The only package that knows the metrics library."""

from loraplex_server.metrics.calls import OUTCOMES, CallMetrics
from loraplex_server.metrics.gateway import Gateway
from loraplex_server.metrics.hooks import remembered
from loraplex_server.metrics.metrics import Metrics
from loraplex_server.metrics.page import MetricsPage

__all__ = ["OUTCOMES", "CallMetrics", "Gateway", "Metrics", "MetricsPage", "remembered"]
