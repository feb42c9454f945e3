#!/usr/bin/env bash
# Makes the environment that everything else runs in, from nothing but Python 3.11 or 3.12. A second run returns at once.
#
#   bash slurm/setup_env.sh              the environment (.venv), with exactly the versions in requirements/*.txt
#   bash slurm/setup_env.sh --compile    requirements/*.in -> *.txt, new pins (make requirements)
#
#   BIOMERGE_DEVICE=cpu|cuda  which set (default: cuda where there is nvidia-smi, else what .venv has, else cpu).
#                             On a cluster's login node without a GPU: BIOMERGE_DEVICE=cuda.
#   PYTHON=python3.12         the interpreter (default: the first of python3.11, python3.12, python3 that fits)
#   VENV=/scratch/me/venv     where (default: .venv beside this folder)
#   BIOMERGE_TORCH_INDEX=URL  a mirror of PyTorch's CPU index
#
# pip's own settings (index-url, extra-index-url, find-links, no-index, trusted-host, cert, proxy) hold for uv as well.
set -euo pipefail

say() { printf 'setup_env: %s\n' "$*"; }
die() {
  printf 'setup_env: error: %s\n' "$1" >&2
  shift
  (($#)) && printf '           %s\n' "$@" >&2
  exit 1
}

[[ $(uname -sm) == "Linux x86_64" ]] || # before a word that a Mac's tools do not know
  die "the pinned sets are for Linux on x86_64, this is $(uname -sm)." "A Linux container or WSL 2 runs them."

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$(realpath -ms -- "${VENV:-$ROOT/.venv}")
STAMP=$VENV/biomerge-env.stamp           # what is installed here
UNFINISHED=$VENV/biomerge-env.unfinished # there while it is being installed, and after an interruption
TORCH_INDEX=${BIOMERGE_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
PYTHONS=${PYTHON:-python3.11 python3.12 python3 python}
unset PYTHONHOME PYTHONPATH # a cluster's modules set them; they would shadow the pinned packages

choose_device() {
  DEVICE=${BIOMERGE_DEVICE:-}
  if [[ -z $DEVICE ]] && command -v nvidia-smi >/dev/null; then DEVICE=cuda; fi
  DEVICE=${DEVICE:-$(sed -n 's/^device //p' "$STAMP" 2>/dev/null || true)}
  DEVICE=${DEVICE:-cpu}
  [[ $DEVICE == cpu || $DEVICE == cuda ]] || die "BIOMERGE_DEVICE is '$DEVICE'; it must be cpu or cuda."
  PINS=$ROOT/requirements/$DEVICE.txt
}

python_version() { "$1" -ISc 'import platform; print(platform.python_version())' 2>/dev/null || true; }
is_fit() { [[ $(python_version "$1") == 3.1[12].* ]]; }

# What the environment depends on. A moved environment is a broken one, so its path counts too.
stamp_text() {
  printf 'device %s\npython %s\nvenv %s\n' "$DEVICE" "$(python_version "$VENV/bin/python")" "$VENV"
  cat "$PINS" "$ROOT/slurm/setup_env.sh" | sha256sum
}

is_ready() { [[ -f $STAMP && ! -e $UNFINISHED && $(<"$STAMP") == "$(stamp_text)" ]]; }

make_venv() {
  local candidate base found=''
  for candidate in $PYTHONS; do
    found+=" $candidate $(python_version "$candidate"),"
    is_fit "$candidate" || continue
    # The real interpreter's path: the candidate may be a shim, or belong to the environment to be replaced.
    base=$("$candidate" -Ic 'import ensurepip, sys, venv; print(sys._base_executable)' 2>/dev/null) ||
      die "$candidate cannot make virtual environments (no venv or ensurepip module)." \
        "On Debian and Ubuntu: apt-get install python3-venv; or name another Python with PYTHON=/path/to/python3."
    say "$base -> $VENV"
    rm -rf -- "$VENV"
    mkdir -- "$VENV"
    : >"$UNFINISHED"
    "$base" -m venv "$VENV" || die "$base -m venv $VENV failed (see above)."
    return
  done
  die "no Python 3.11 or 3.12 found (tried:${found%,})." \
    "Install one (Debian: python3 python3-venv; a cluster: module load python/3.11) or name it with PYTHON=."
}

# pip's settings as uv's, in UV_ARGS. LOCAL_TORCH: a wheel folder has CPU builds of torch.
read_pip_settings() {
  local name value place index=''
  UV_ARGS=(--index-strategy unsafe-best-match) # pip's: the best version of all indexes, not the first index
  LOCAL_TORCH=''
  while IFS='=' read -r name value; do
    value=$(tr -d "'" <<<"${value//\\n/ }") # Python's spelling, lines as \n
    for place in $value; do
      place=${place/#\~/$HOME}
      [[ $place != /* && $place != file:/* || -e ${place#file://} ]] || continue # uv would stop there
      case ${name##*.} in
        index-url) index=$place ;;
        extra-index-url) UV_ARGS+=(--index "$place") ;;
        trusted-host) UV_ARGS+=(--allow-insecure-host "$place") ;;
        no-index) [[ $place != [1TtYy]* ]] || UV_ARGS+=(--no-index) ;;
        cert) export SSL_CERT_FILE=${SSL_CERT_FILE:-$place} ;;
        proxy) export HTTPS_PROXY=${HTTPS_PROXY:-$place} ;;
        find-links)
          if [[ -n $(compgen -G "${place#file://}/torch-*+cpu-*") ]]; then
            [[ $DEVICE == cpu ]] || continue # X+cpu would satisfy torch==X
            LOCAL_TORCH=yes
          fi
          UV_ARGS+=(--find-links "$place")
          ;;
      esac
    done
  done < <("$VENV/bin/python" -m pip config list | sort -r) # of two, the environment's variable comes last
  [[ -z $index || -n ${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-}} ]] || UV_ARGS+=(--default-index "$index")
}

uv_pip() { # with uv's progress bar on a terminal, without its 270 lines in a log
  if [[ -t 2 ]]; then "$VENV/bin/uv" pip "$@"; else "$VENV/bin/uv" pip --quiet "$@"; fi
}

# uv touches nothing before it has everything: where a good environment stood and stands, it stays good.
fail() {
  [[ ! -e $STAMP || $(list_packages) != "$STOOD" ]] || rm -f -- "$UNFINISHED"
  die "$@"
}

list_packages() { ls "$VENV"/lib/python3.*/site-packages; }

install() {
  local uv torch
  [[ -e $STAMP || -e $UNFINISHED || -z $(ls -A -- "$VENV" 2>/dev/null) ]] ||
    die "$VENV is there, and this script did not make it: it is left alone." \
      "Remove it yourself, or name another place with VENV=."
  if [[ -e $UNFINISHED ]] || ! is_fit "$VENV/bin/python" ||
    [[ -n ${PYTHON:-} && $(python_version "$PYTHON") != "$(python_version "$VENV/bin/python")" ]]; then
    make_venv
  fi
  : >"$UNFINISHED"
  STOOD=$(list_packages)
  uv=$(grep '^uv==' "$PINS") torch=$(grep '^torch==' "$PINS")
  [[ $("$VENV/bin/uv" --version 2>/dev/null) == "uv ${uv#uv==}"* ]] ||
    PIP_USER=0 "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$uv" ||
    fail "pip could not install $uv (see above)." "Check pip's index-url, proxy and cert: pip config list"
  read_pip_settings
  say "installing the $DEVICE set (5 GB, cuda 15; minutes at first, a minute from uv's cache)"
  # torch+cpu is not on the ordinary index. Where no wheel folder has it, it comes from PyTorch's CPU index, and only
  # torch does, so that its stale copies of other packages are never chosen.
  if [[ $DEVICE == cpu ]] && ! uv_pip install --python "$VENV" --no-deps "${UV_ARGS[@]}" "$torch" 2>/dev/null; then
    uv_pip install --python "$VENV" --no-deps --default-index "$TORCH_INDEX" "$torch" ||
      fail "$torch could not be installed: pip's find-links folders have no wheel of it for this Python, and" \
        "$TORCH_INDEX gave none (uv's reason is above)." \
        "A mirror: BIOMERGE_TORCH_INDEX=URL. A downloaded wheel: PIP_FIND_LINKS=FOLDER. Another Python: PYTHON=python3.12."
  fi
  uv_pip sync --python "$VENV" --compile-bytecode "${UV_ARGS[@]}" "$PINS" ||
    fail "the $DEVICE set could not be installed; uv's reason is above." \
      "No route to an index: set pip's index-url, find-links or proxy (pip config list); uv takes them over." \
      "No such version there: another mirror, or new pins with 'make requirements'." \
      "No room: VENV=/path/with/room and UV_CACHE_DIR. What was downloaded stays in uv's cache."
  uv_pip install --python "$VENV" --no-deps --no-build-isolation -e "$ROOT" ||
    fail "the project itself could not be installed from $ROOT (see above)."
  stamp_text >"$STAMP"
  rm -f -- "$UNFINISHED"
}

# One file serves Python 3.11 and 3.12: resolved for 3.11, then for 3.12 within the same versions.
compile_pins() {
  local args work
  [[ -x $VENV/bin/uv ]] || die "no uv in $VENV yet: run 'make env' first."
  cd "$ROOT"
  work=$(mktemp -d)
  for DEVICE in cpu cuda; do
    read_pip_settings
    args=("${UV_ARGS[@]}" --python-platform x86_64-manylinux_2_31 --no-annotate --no-emit-index-url --no-emit-find-links
      --custom-compile-command "make requirements" "requirements/$DEVICE.in")
    if [[ $DEVICE == cpu ]]; then args+=(--override requirements/overrides.txt); fi
    if [[ $DEVICE == cpu && -z $LOCAL_TORCH ]]; then args+=(--index "$TORCH_INDEX"); fi
    uv_pip compile "${args[@]}" --upgrade --python-version 3.11 -o "$work/3.11" >/dev/null ||
      die "requirements/$DEVICE.in has no solution for Python 3.11 (see above)."
    if [[ -n $LOCAL_TORCH ]]; then
      say "$DEVICE: not checked for Python 3.12, for which a local wheel folder may have no torch"
    else
      uv_pip compile "${args[@]}" --python-version 3.12 --constraint "$work/3.11" -o "$work/3.12" >/dev/null ||
        die "requirements/$DEVICE.in has no solution for Python 3.12 within the versions for 3.11 (see above)."
      # A package that only 3.11 needs does no harm on 3.12; the other way round something would be missing.
      ! grep '==' "$work/3.12" | grep -vxFf "$work/3.11" >&2 ||
        die "Python 3.12 needs these, 3.11 does not (above): name them in requirements/base.in."
    fi
    mv "$work/3.11" "requirements/$DEVICE.txt"
    say "requirements/$DEVICE.txt: $(grep -c '==' "requirements/$DEVICE.txt") versions"
  done
}

if [[ ${BASH_SOURCE[0]} != "$0" ]]; then return; fi # sourced by a test, for a function

case ${1:-} in
  --compile)
    compile_pins
    exit
    ;;
  --help | -h)
    sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"
    exit
    ;;
  '') ;;
  *) die "unknown argument '$1' (see --help)." ;;
esac

choose_device
is_ready && exit # quickly and quietly: make calls this before everything else
mkdir -p -- "$(dirname -- "$VENV")"
if command -v flock >/dev/null && exec 9>"$VENV.lock"; then
  flock -n 9 || { say "another setup is at work in $VENV: waiting" && flock 9; } || true
  is_ready && exit # another job did it meanwhile
fi
SECONDS=0
install
say "ready in $SECONDS s: $VENV ($DEVICE)"
say "next: 'make debug' runs the whole pipeline, 'make lab' opens the notebooks; or: source ${VENV#"$PWD/"}/bin/activate"
