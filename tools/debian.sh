#!/usr/bin/env bash
# Debian packages that some tests need (each with the program that shows it is there). Installed when root, else named.
set -euo pipefail
need=()
have() { command -v "$1" >/dev/null 2>&1 || need+=("$2"); }
have chromium chromium            # the browser tests
[ ${#need[@]} -eq 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
else
  echo "Some tests will be skipped. To run them too: sudo apt-get install ${need[*]}"
fi
