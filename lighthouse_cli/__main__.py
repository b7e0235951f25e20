from lighthouse_cli.app import main

main()
