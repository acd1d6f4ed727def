"""/metrics of a running proxy, parsed."""

from __future__ import annotations

import time

from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from proxy_process import ProxyProcess

OPENMETRICS = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5"


class Scraped:
    """`families`: type and samples by name."""

    def __init__(self, proxy: ProxyProcess, *fields: str):
        message = proxy.ask("GET", "/metrics", OPENMETRICS, *fields)
        assert message.status == 200, message.body
        self.text = message.body.decode()
        self.families = {
            family.name: family for family in text_string_to_metric_families(self.text)
        }
        self.samples: list[Sample] = [
            sample for family in self.families.values() for sample in family.samples
        ]

    def values(self, name: str, **labels: object) -> list[float]:
        wanted = {label: str(value) for label, value in labels.items()}.items()
        return [
            sample.value
            for sample in self.samples
            if sample.name == name and wanted <= sample.labels.items()
        ]

    def __call__(self, name: str, **labels: object) -> float:
        """The sum of the samples with these labels."""
        return sum(self.values(name, **labels))


def until(proxy: ProxyProcess, value: float, name: str, **labels: object) -> Scraped:
    """Scrape until the metric has this value, and return the last scrape."""
    deadline = time.monotonic() + 10
    while (scraped := Scraped(proxy))(name, **labels) != value:
        assert time.monotonic() < deadline, (value, scraped.values(name, **labels))
        time.sleep(0.02)
    return scraped
