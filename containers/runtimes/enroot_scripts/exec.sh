# Given to enroot as --rc: skips the image's entrypoint, which is its /etc/rc.
exec "$@"
