#!/usr/bin/env bash
# Debian packages that some tests need (each with the program that shows it is there). Installed when root, else named.
set -euo pipefail
need=()
have() { command -v "$1" >/dev/null 2>&1 || need+=("$2"); }
have chromium chromium            # the browser tests
have flite flite                  # a voice: corpora, alignment
have espeak-ng espeak-ng          # phonemes for Kokoro
have ffmpeg ffmpeg                # reads Asterisk's g722
have diatheke diatheke            # what the corpus says
[ -d /usr/share/sword/modules ] || need+=(sword-text-web)
[ -f /usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz ] || need+=(asterisk-core-sounds-en)
[ -d /usr/share/asterisk/sounds/en_US_f_Allison ] || need+=(asterisk-core-sounds-en-g722)
[ ${#need[@]} -eq 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
else
  echo "Some tests will be skipped. To run them too: sudo apt-get install ${need[*]}"
fi
