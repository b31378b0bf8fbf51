#!/bin/sh
# Puts WordNet 3.0 where examples/wordnet.py looks for it, from Debian's package, if it is nowhere yet.
set -u

package=wordnet-base
for folder in "${SPECTRAL_KERNELS_DATA:-}" "${SPECTRAL_KERNELS_DATA:-}/wordnet" data/wordnet data/usr/share/wordnet \
    /usr/share/wordnet; do
    if [ -f "$folder/data.noun" ]; then
        echo "WordNet: found in $folder"
        exit 0
    fi
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ "$(id -u)" = 0 ] && apt-get update > /dev/null 2>&1
if (cd "$work" && apt-get download "$package" > /dev/null 2>&1) && mkdir -p data &&
    dpkg-deb -x "$work/$package"*.deb data > /dev/null 2>&1; then
    echo "WordNet: unpacked Debian's $package into data/"
    exit 0
fi
echo "WordNet: Debian's $package cannot be had here; put its data.noun and the others into data/wordnet" >&2
exit 1
