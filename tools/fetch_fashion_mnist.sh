#!/bin/sh
# Puts Fashion-MNIST where spectral_kernels.training.data looks for it, from Debian's package, if it is nowhere yet.
# Always exits 0 and says one line: without it, `spectral-kernels` tries torchvision's download, then smaller data.
set -u

package=dataset-fashion-mnist
debian=usr/share/datasets/fashion-mnist
file=train-images-idx3-ubyte

for folder in "${SPECTRAL_KERNELS_DATA:-}" "${SPECTRAL_KERNELS_DATA:-}/fashion-mnist" data/fashion-mnist \
    data/FashionMNIST/raw "data/$debian" "/$debian"; do
    if [ -f "$folder/$file" ] || [ -f "$folder/$file.gz" ]; then
        echo "Fashion-MNIST: found in $folder"
        exit 0
    fi
done

if ! command -v apt-get > /dev/null; then
    echo "Fashion-MNIST: not here, and there is no apt-get to install $package with"
    exit 0
fi

if [ "$(id -u)" = 0 ]; then
    apt-get update > /dev/null 2>&1
    if DEBIAN_FRONTEND=noninteractive apt-get install -y "$package" > /dev/null 2>&1; then
        echo "Fashion-MNIST: installed Debian's $package"
        exit 0
    fi
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if (cd "$work" && apt-get download "$package" > /dev/null 2>&1) && mkdir -p data &&
    dpkg-deb -x "$work/$package"*.deb data > /dev/null 2>&1; then
    echo "Fashion-MNIST: unpacked Debian's $package into data/"
else
    echo "Fashion-MNIST: Debian's $package cannot be had here"
fi
exit 0
