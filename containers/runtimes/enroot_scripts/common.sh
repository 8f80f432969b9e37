# Run by enroot instead of its own library (ENROOT_LIBRARY_PATH), after it has read its settings: prints two folders.
printf '%s\n' "$ENROOT_DATA_PATH" "$ENROOT_TEMP_PATH"
exit 0
