"""The report: what a run folder holds, as one HTML page that needs nothing beside itself.

    findings (values read from the folder) -> sections (what each part of the page says, or what it lacks) -> html

Python decides what is said and where a line runs; the template beside it only places that, and escapes all of it. Left out: reading the
folder and opening its model, which is the command's business, and everything that would need a script or the network.
"""

from vitq.report.close_up import close_ups
from vitq.report.costs import hurting
from vitq.report.findings import Bars, CloseUp, File, Findings, Panel
from vitq.report.html import lacking, page
from vitq.report.places import without_places

__all__ = ["Bars", "CloseUp", "File", "Findings", "Panel", "close_ups", "hurting", "lacking", "page", "without_places"]
