"""What every command line of the project uses: errors in one line, whole files, progress bars."""
