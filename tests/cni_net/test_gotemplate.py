"""Templates, among them the ones that clusters have."""

from __future__ import annotations

import json

import pytest
from shim_cni_net.gotemplate import TemplateError, render

VALUES = {"PodCIDR": "10.1.0.0/24", "PodCIDRRanges": ["10.1.0.0/24", "fd00::/64"], "Routes": [], "Empty": ""}

# In the manner of the templates that are used with containerd's conf_template.
CLUSTER = """{
  "name": "k8s-pod-network",
  "cniVersion": "1.0.0",
  "plugins": [{
    "type": "ptp", "mtu": 1460,
    "ipam": {
      "type": "host-local",
      "subnet": "{{.PodCIDR}}",
      "ranges": [{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}],
      "routes": [{{ range $i, $route := .Routes }}{{ if $i }}, {{ end }}{"dst": "{{ $route }}"}{{ end }}]
    }
  }]
}"""


def test_a_clusters_template() -> None:
    ipam = json.loads(render(CLUSTER, VALUES))["plugins"][0]["ipam"]
    assert ipam["subnet"] == "10.1.0.0/24"
    assert ipam["ranges"] == [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]]
    assert ipam["routes"] == []


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("", ""),
        ("plain } text { here", "plain } text { here"),
        ("a {{.PodCIDR}} b", "a 10.1.0.0/24 b"),
        ("a {{- .PodCIDR -}} b", "a10.1.0.0/24b"),
        ("a  {{- /* nothing */ -}}  b", "ab"),
        ("{{range .PodCIDRRanges}}<{{.}}>{{end}}", "<10.1.0.0/24><fd00::/64>"),
        ("{{range $x := .PodCIDRRanges}}{{$x}},{{end}}", "10.1.0.0/24,fd00::/64,"),
        ("{{range $i, $x := .PodCIDRRanges}}{{$i}}={{$x}} {{$.PodCIDR}};{{end}}",
         "0=10.1.0.0/24 10.1.0.0/24;1=fd00::/64 10.1.0.0/24;"),
        ("{{range .Routes}}x{{else}}none{{end}}", "none"),
        ("{{if .Empty}}a{{else}}b{{end}}{{if .PodCIDR}}c{{end}}", "bc"),
        ("{{with .PodCIDR}}<{{.}}>{{end}}{{with .Empty}}x{{else}}y{{end}}", "<10.1.0.0/24>y"),
        ("{{range .PodCIDRRanges}}{{range $.PodCIDRRanges}}.{{end}}{{end}}", "...."),
        ("line\n{{- if .PodCIDR}}\nx\n{{- end}}\n", "line\nx\n"),
    ],
)  # fmt: skip
def test_renders(template: str, text: str) -> None:
    assert render(template, VALUES) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{.Subnet}}", "line 1: there is no .Subnet here"),
        ("\n{{.PodCIDRRanges}}", "line 2: .PodCIDRRanges is a list"),
        ("{{range .PodCIDR}}{{end}}", "line 1: .PodCIDR is not a list"),
        ("{{range .PodCIDRRanges}}", "line 1: {{range}} has no {{end}}"),
        ("{{end}}", "line 1: {{end}} is not supported"),
        ("{{else}}", "line 1: {{else}} is not supported"),
        ("{{if .Empty}}{{else}}{{else}}{{end}}", "line 1: {{else}} is not supported"),
        ("{{if .Empty}}{{else if .PodCIDR}}{{end}}", "line 1: {{else if .PodCIDR}} is not supported"),
        ("{{printf .PodCIDR}}", "line 1: {{printf .PodCIDR}} is not supported"),
        ("{{.PodCIDR | html}}", "is not supported"),
        ("{{$x}}", r"line 1: \$x is not defined here"),
        ("{{if eq .PodCIDR .PodCIDR}}{{end}}", "is not supported"),
        ("{{.PodCIDR.x}}", "is not supported"),
        ("\n\n{{.PodCIDR", "line 3: unclosed action"),
        ("{{if .PodCIDR}}" * 40, "nested too deeply"),
    ],
)
def test_what_it_does_not_know_is_named(template: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(template, VALUES)
