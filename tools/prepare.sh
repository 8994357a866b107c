#!/bin/sh
# Installs what the tests and the demonstration need: Debian packages, the virtual environment, crictl and critest.
# What can't be installed is named, with what goes missing for it.
set -eu
cd "$(dirname "$0")/.."

PACKAGES="python3-venv gcc libc6-dev crun containernetworking-plugins docker-registry skopeo busybox-static iproute2 nftables iptables procps $*"

missing=
for package in $PACKAGES; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed$' || missing="$missing $package"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "prepare: installing$missing"
        {
            apt-get -qq -o DPkg::Lock::Timeout=600 update
            # docker-registry starts a service of its own when it can: nothing here wants it.
            DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq -y -o DPkg::Lock::Timeout=600 \
                install --no-install-recommends $missing
        } >/dev/null || { echo "prepare: apt-get could not install:$missing" >&2; exit 1; }
    else
        echo "prepare: missing Debian packages:$missing (run as root to have them installed)" >&2
    fi
fi

stamp=.venv/.installed
if [ ! -e $stamp ] || [ -n "$(find requirements-dev.txt pyproject.toml porto_api/pyproject.toml plugins/*/pyproject.toml plugins/*/hatch_build.py plugins/porto_runtime/src/shim_porto_runtime/init/init.c -newer $stamp)" ]; then
    echo "prepare: installing Python packages into .venv"
    [ -x .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
    # What a fresh environment needs, for the tests that make one: they run without a network.
    rm -rf .venv/wheels
    .venv/bin/pip wheel --quiet --disable-pip-version-check -w .venv/wheels hatchling . ./porto_api ./plugins/*/
    rm -f .venv/wheels/shim_*.whl
    touch $stamp
fi

tools=tests/tools
if [ ! -x $tools/bin/crictl ] || [ ! -x $tools/bin/critest ] || [ $tools/go.mod -nt $tools/bin/critest ]; then
    version=$(sed -n 's/.*sigs.k8s.io\/cri-tools v/v/p' $tools/go.mod | cut -d' ' -f1)
    if go=$(.venv/bin/python -m tools.go); then
        echo "prepare: building crictl and critest $version"
        (
            cd $tools
            export GOTOOLCHAIN=local GOFLAGS=-buildvcs=false CGO_ENABLED=0
            "$go" build -o bin/crictl -ldflags "-X sigs.k8s.io/cri-tools/pkg/version.Version=$version" \
                sigs.k8s.io/cri-tools/cmd/crictl
            "$go" test -c -o bin/critest sigs.k8s.io/cri-tools/cmd/critest
        ) || echo "prepare: crictl and critest can't be built: their tests are skipped" >&2
    else
        echo "prepare: no Go (above why): crictl and critest can't be built, their tests are skipped" >&2
    fi
fi
