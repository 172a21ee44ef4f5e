#!/bin/bash
# Puts the agent with a Python of its own into OUT, to lie at /opt/glowplug on a host that has systemd and
# containerd and nothing else: the distribution's interpreter, its standard library and every shared library
# down to libc and the loader, and the agent's packages.
#
#   deploy/bundle/build.sh OUT          OUT/versions/VERSION/{bin,lib}, OUT/current -> versions/VERSION
#
#   EXTRAS=agent,s3   what of pyproject.toml's extras goes in (agent)
#   PACKAGES=...      which of our packages (agent glowplug imagefs converter cluster pages)
#   PYTHON=python3    the distribution's interpreter, 3.11 or newer
#
# Needs patchelf, and python3 with venv. The kernel wants the loader's path absolute, so a bundle works at its
# place only; each version has its own folder, and a process never sees another version's files.
set -euo pipefail

out=${1:?usage: build.sh OUT}
source=$(cd "$(dirname "$0")/../.." && pwd)
python=$(readlink -f "$(command -v "${PYTHON:-python3}")")
extras=${EXTRAS:-agent}
read -ra packages <<<"${PACKAGES:-agent glowplug imagefs converter cluster pages}"

number=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$source/pyproject.toml")
sum=$(cd "$source" && find pyproject.toml "${packages[@]}" -type f ! -path '*/__pycache__/*' -print0 |
    sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-12)
version=$number-$sum
root=$out/versions/$version
place=/opt/glowplug/versions/$version
rm -rf "$root"
mkdir -p "$root/bin" "$root/lib"

# The interpreter and its library, without what a daemon has no use for.
name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
library=$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
cp "$python" "$root/bin/python3"
tar -C "$library" --exclude=__pycache__ --exclude='config-*' --exclude='./test' --exclude='./idlelib' \
    --exclude='./tkinter' --exclude='./lib2to3' --exclude='./ensurepip' --exclude='./turtledemo' \
    --exclude='./pydoc_data' --exclude='./dist-packages' --exclude='./site-packages' \
    --exclude='./EXTERNALLY-MANAGED' --exclude='./sitecustomize.py' -cf - . |
    (mkdir -p "$root/lib/$name" && tar -C "$root/lib/$name" --no-same-owner -xf -)

# The packages. The interpreter itself says where it will look for them.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
modules=$("$root/bin/python3" -I -c 'import site; print(site.getsitepackages()[-1])')
case $modules in "$root"/*) ;; *) modules=$root/lib/$name/site-packages ;; esac
mkdir -p "$work/source"
cp -r "$source"/{pyproject.toml,README.md,LICENSE} "${packages[@]/#/$source/}" "$work/source/"
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check --target "$modules" "$work/source[$extras]"
rm -rf "$modules/bin"
find "$root" -name __pycache__ -prune -exec rm -rf {} +

# Every library that any of it is linked to, and the loader.
find "$root" -type f \( -name '*.so' -o -name '*.so.*' -o -path "$root/bin/python3" \) -print0 |
    xargs -0 -n 1 ldd 2>/dev/null |
    awk '$2 == "=>" && $3 ~ /^\// { print $3 } $1 ~ /^\/.*ld-linux/ { print $1 }' | sort -u >"$work/libraries"
while read -r file; do
    case $file in "$root"/*) ;; *) cp -L -n "$file" "$root/lib/" ;; esac
done <"$work/libraries"
loader=$(basename "$(grep -m 1 ld-linux "$work/libraries")")
# An old-style RPATH holds for what a library loads, too; a RUNPATH would not.
patchelf --set-interpreter "$place/lib/$loader" --force-rpath --set-rpath "$place/lib" "$root/bin/python3"

cat >"$root/bin/glowplug" <<END
#!$place/bin/python3 -I
import os

# OpenSSL would look where the distribution that it was built on keeps certificates.
for file in (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
):
    if "SSL_CERT_FILE" not in os.environ and os.path.exists(file):
        os.environ["SSL_CERT_FILE"] = file

from glowplug.cli import main

main()
END
chmod 755 "$root/bin/glowplug"
# By hash and never looked at again: the files are read-only, whatever their times say.
"$python" -m compileall -q -s "$root" -p "$place" --invalidation-mode unchecked-hash "$root/lib" >/dev/null || true

# The licences of what was taken from the distribution.
if command -v dpkg-query >/dev/null; then
    mkdir -p "$root/licences"
    { cat "$work/libraries"; echo "$python"; } | while read -r file; do
        file=$(readlink -f "$file")
        # The package may list it from before /lib became a link.
        { dpkg-query -S "$file" || dpkg-query -S "${file#/usr}"; } 2>/dev/null | cut -d : -f 1 || true
    done | sort -u | while read -r package; do
        cp "/usr/share/doc/$package/copyright" "$root/licences/$package" 2>/dev/null || true
    done
fi

ln -sfn "versions/$version" "$out/current"
echo "$version"
