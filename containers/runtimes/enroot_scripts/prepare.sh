# Import and unpack an image, unless that was done completely: bash prepare.sh CONTAINER IMAGE
#
# The lock lies where the container will: nodes wait for each other only if they share that folder. Its name begins
# with a dot, because enroot lists every other file there as a container.
set -eu
name=$1 image=$2 marker=.amlaunch-whole download=
folders=$(ENROOT_LIBRARY_PATH=$(dirname "$0") enroot version)
{ read -r data && read -r temp; } <<<"$folders"

# Containers that no job has started for 30 days, and the remains of killed ones.
remove_unused() {
    for folder in "$data"/amlaunch-*/; do
        other=$(basename "$folder")
        if [ -d "$folder" ] && [ "$other" != "$name" ] && [ -z "$(find "$folder$marker" -mtime -30 2>/dev/null)" ]; then
            (flock -n 8 && enroot remove --force "$other" 8>&-) 8>"$data/.$other.lock" || :
        fi
    done
}

clean_up() {
    rm -f "$download"
    [ -e "$data/$name/$marker" ] || enroot remove --force "$name" >/dev/null 2>&1 || :
}

mkdir -p "$data"
exec 9>"$data/.$name.lock"
flock 9
if [ -e "$data/$name/$marker" ]; then
    touch "$data/$name/$marker"
    exit 0
fi
trap clean_up EXIT
trap 'exit 1' TERM INT HUP USR1
remove_unused
case $image in docker://*)
    mkdir -p "$temp"
    download=$(mktemp -u "$temp/amlaunch-XXXXXXXX.sqsh")
    enroot import --output "$download" "$image"
    image=$download
    ;;
esac
enroot create --force --name "$name" "$image"
touch "$data/$name/$marker"
