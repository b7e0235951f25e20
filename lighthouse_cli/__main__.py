from lighthouse_cli._start import main

main()
